"""Counting the multiply-accumulates of a dynamic network in integers and in float."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.modes.coverage import counter, float_run, in_single_products, macs_of
from qat_lightning.modes.eager.layers import without_fast_paths
from qat_lightning.modes.own_weights import float_rows
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.uncalibrated.checking import run
from qat_lightning.settings.recipe import Recipe


def with_macs(
    rows: list[LayerCoverage],
    network: nn.Module,
    example: Example,
    recipe: Recipe,
    functions: Mapping[str, int] | None = None,
    reached: Collection[str] = (),
    *,
    prefix: str = "",
) -> tuple[list[LayerCoverage], list[LayerCoverage]]:
    """Add the multiply-accumulates of each layer in one call; a weight-only network has none in integers.

    Custom modules that multiply by weights of their own get rows, too: these weights stay float.

    For attention only the linear maps count, which become integer; its other products count as between layers.

    Args:
        rows: One row per layer.
        network: The float network; not changed.
        example: One call.
        recipe: The recipe it is quantized with.
        functions: Floating point operations of rows that are not layers of the network.
        reached: Custom modules whose products are rows already.
        prefix: The network's name in the LightningModule.

    Returns:
        The rows, and one for the products between layers, if there are any.
    """
    known = {*reached, *(row.name for row in rows)}
    custom = {name: own for name, own in float_run(network, example).custom.items() if name not in known}
    rows = [*rows, *float_rows(network, custom, lambda name: recipe.selects(join(prefix, name)))]
    if recipe.kind != "dynamic":
        return rows, []
    network = copy.deepcopy(network)
    without_fast_paths(network)
    try:
        with in_single_products(), _linear_maps(network) as attention, counter() as counted:
            run(network, example)
    except Exception as error:  # noqa: BLE001 - a custom op that breaks the counter must not fail the conversion
        warnings.warn(f"Multiply-accumulates were not counted: {type(error).__name__}: {error}", stacklevel=2)
        return rows, []
    root = type(network).__name__
    counts = {name.removeprefix(f"{root}."): sum(ops.values()) for name, ops in counted.get_flop_counts().items()}
    counts |= attention | dict(functions or {})
    # A custom module counts those of its layers, too.
    found = {row.name: counts.get(row.name or root, 0) for row in rows if row.name in known}
    rows = [replace(row, macs=macs_of(found[row.name], example)) if row.name in found else row for row in rows]
    left = macs_of(max(0, counted.get_total_flops() - sum(found.values())), example)
    reason = "kind='dynamic' quantizes layers, not the operations between them"
    return rows, [LayerCoverage("", "functions", False, reason, "op", macs=left)] if left else []


@contextmanager
def _linear_maps(network: nn.Module) -> Iterator[dict[str, int]]:
    """The floating point operations of the four linear maps of attention, by name: two per multiply-accumulate."""
    counts: dict[str, int] = {}

    def count(name: str, layer: nn.MultiheadAttention) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            query, key, value = (*args, *(kwargs[part] for part in ("query", "key", "value")[len(args) :]))[:3]
            values = 2 * query.numel() + key.numel() + value.numel()
            counts[name] = counts.get(name, 0) + 2 * values * layer.embed_dim

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [count(name, part) for name, part in network.named_modules() if isinstance(part, nn.MultiheadAttention)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
