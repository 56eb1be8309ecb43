"""The type of functions that write integer layers in the graph that a format is made from."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from qat_lightning.layers.integer import IntegerLayer

Spelling = Callable[[IntegerLayer, str], nn.Module]
"""Maps a layer of the kinds without calibration and its name to a module of ops."""
