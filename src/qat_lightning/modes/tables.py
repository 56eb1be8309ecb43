"""Embeddings in static networks: which tables are fake-quantized and become integers, and why others stay float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qat_lightning.layers.integer.weight_only import WeightOnlyEmbedding
from qat_lightning.layers.tables import integer_table, why_float
from qat_lightning.modes.protocol import EXCLUDED


def choose_tables(
    tables: Mapping[str, nn.Module], selects: Callable[[str], bool], read: Mapping[int, str]
) -> tuple[list[str], dict[str, str]]:
    """Decide which embeddings are fake-quantized.

    A table that is also needed in float stays float, because storing it twice would take more memory.

    Args:
        tables: Embeddings by name, including several names of the same one.
        selects: Whether the recipe selects a name.
        read: For each tensor that is read directly, by its ``id``, the reader in words.

    Returns:
        The names of the tables to quantize, and the reasons for the others.
    """
    reasons = {name: EXCLUDED if not selects(name) else why_float(module) for name, module in tables.items()}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    read = dict(read)
    for name in reasons:
        read.setdefault(id(_weight(tables[name])), tied_to(name))
    for name, module in tables.items():
        if name not in reasons and id(_weight(module)) in read:
            reasons[name] = read[id(_weight(module))]
    return [name for name in tables if name not in reasons], reasons


def _weight(table: nn.Module) -> Any:
    return table._parameters.get("weight")


def tied_to(layer: str) -> str:
    """The reason for a table whose weight is shared with a float layer."""
    return f"its weight is shared with {layer!r}, which stays float"


READ = "forward reads its weight directly, besides calling it"
"""The reason for a table whose weight is read by a float function."""


def integer_tables(tables: Iterable[tuple[str, nn.Module]]) -> dict[str, WeightOnlyEmbedding]:
    """The integer embeddings of fake-quantized ones; embeddings that share a weight share its integers.

    Args:
        tables: Names and modules, on the CPU, in float32.
    """
    made: dict[str, WeightOnlyEmbedding] = {}
    of_weight: dict[int, WeightOnlyEmbedding] = {}
    for name, module in tables:
        key = id(_weight(module))
        table = made[name] = integer_table(module)
        first = of_weight.setdefault(key, table)
        if torch.equal(first.integers, table.integers) and torch.equal(first.scales, table.scales):
            table.integers, table.scales = first.integers, first.scales
    return made
