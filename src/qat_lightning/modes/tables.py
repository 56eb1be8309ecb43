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

    A table that something else needs in float stays float: kept both ways it would only take more room.

    Args:
        tables: Embeddings by name, several names of one each included.
        selects: Whether the recipe selects one.
        read: For each tensor that is read as it is, by its ``id``, what reads it in words.

    Returns:
        The names of those that are, and for the others the reason.
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
    """Why a table stays float whose weight a float layer has as well."""
    return f"its weight is shared with {layer!r}, which stays float"


READ = "forward reads its weight directly, besides calling it"
"""Why a table stays float whose weight a float function takes."""


def integer_tables(tables: Iterable[tuple[str, nn.Module]]) -> dict[str, WeightOnlyEmbedding]:
    """The integer embeddings of fake-quantized ones; those with one weight have the same integers in memory.

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
