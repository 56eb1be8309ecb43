"""How integer layers are written in the graph that a format is made from."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from qat_lightning.layers.integer import IntegerLayer

Spelling = Callable[[IntegerLayer, str], nn.Module]
"""The layer and its name in, a module of ops out; of the kinds without calibration only."""
