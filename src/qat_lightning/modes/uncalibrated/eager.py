"""Eager mode: layers are replaced in place, and the user's own ``forward`` runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qat_lightning.errors import CheckpointMismatchError
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.layers.adapters import inner_of
from qat_lightning.layers.integer import IntegerLayer, integer_layer, why_not
from qat_lightning.layers.operators import WEIGHTED
from qat_lightning.modes.eager.layers import without_fast_paths
from qat_lightning.modes.judging import Names
from qat_lightning.modes.plain_attributes import take_attributes
from qat_lightning.modes.protocol import EXCLUDED, Converted, LayerCoverage
from qat_lightning.modes.uncalibrated.adapters import whole, why_beside
from qat_lightning.modes.uncalibrated.checking import (
    check_layers,
    check_whole_of,
    end_to_end,
    refuse_nothing,
    run_float,
    run_integer,
)
from qat_lightning.modes.uncalibrated.macs import with_macs
from qat_lightning.settings.recipe import Recipe

Shares = Mapping[str, Mapping[str, Tensor]]
"""For each layer, the represented shares of the ranges of its clipped weights: see `quantize_rows`."""


def quantize_eager(
    network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "", shares: Shares
) -> Converted:
    """See `qat_lightning.modes.uncalibrated.quantize`."""
    original = float_copy(network)
    expected = run_float(original, example)
    coverage = cover(original, recipe, prefix)
    refuse_nothing(original, coverage, recipe)
    chosen = [row.name for row in coverage if row.quantized]
    plan = {"layers": [[name, type(original.get_submodule(name)).__name__] for name in chosen], "prefix": prefix}
    integer = skeleton(original, plan, recipe, shares)
    actual, calls = run_integer(integer, example)
    names = Names(prefix, {name for name, _ in original.named_modules()})
    checks, notes = check_layers(calls, recipe.target, names)
    whole = check_whole_of(integer, actual, calls, example, checks, names)
    coverage, between = with_macs(coverage, original, example, recipe, prefix=prefix)
    return Converted(integer, coverage, checks, [*notes, *end_to_end(expected, actual)], between, whole)


def skeleton(network: nn.Module, plan: Mapping[str, Any], recipe: Recipe, shares: Shares | None = None) -> nn.Module:
    """Give a float network the structure of the integer one, to load its ``state_dict`` into.

    Args:
        network: The float network; a copy is changed.
        plan: ``quantization_plan`` of the integer network: plain values only.
        recipe: The recipe it was quantized with.
        shares: The shares of clipped ranges that training chose.

    Returns:
        The copy, its layers rounded from the current weights.

    Raises:
        CheckpointMismatchError: The network does not have these layers.
    """
    network = float_copy(network)
    attributes = plan.get("attributes", {})
    take_attributes(network, attributes)
    network, _ = inner_of(whole(network, recipe))
    without_fast_paths(network)
    modules = dict(network.named_modules(remove_duplicate=False))
    made: dict[nn.Module, IntegerLayer] = {}
    prefix = plan.get("prefix", "")
    for name, kind in plan["layers"]:
        own = recipe.of(join(prefix, name))
        if name not in modules or type(modules[name]).__name__ != kind or why_not(modules[name], own):
            raise CheckpointMismatchError(
                f"{type(network).__name__} is not the network that was quantized: it should have a {kind} at "
                f"{name!r}. Give a float network built by the same code with the same arguments."
            )
        made[modules[name]] = integer_layer(modules[name], own, (shares or {}).get(name))
    for name, module in modules.items():
        # A layer with several names becomes one layer with the same names.
        if module in made and name:
            parent, _, leaf = name.rpartition(".")
            modules[parent]._modules[leaf] = made[module]
    network = made.get(network, network)
    layers = [list(row) for row in plan["layers"]]
    network.__dict__["quantization_plan"] = {"layers": layers, "prefix": prefix, "attributes": attributes}
    return network


def float_copy(network: nn.Module) -> nn.Module:
    """A copy on the CPU in float32 and evaluation, which may be modified."""
    copied = copy.deepcopy(network).cpu().float().eval()
    return copied.requires_grad_(False)


def cover(network: nn.Module, recipe: Recipe, prefix: str) -> list[LayerCoverage]:
    """Which layers can become integer, and why others stay float."""
    rows = []
    inside: list[str] = []
    for name, module in network.named_modules():
        if not isinstance(module, WEIGHTED) or any(name.startswith(outer) for outer in inside):
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.append(f"{name}." if name else "")
        full = join(prefix, name)
        own = recipe.of(full)
        reason = EXCLUDED if not recipe.selects(full) else why_beside(network, name) or why_not(module, own)
        rows.append(LayerCoverage(name, type(module).__name__, not reason, reason))
    return rows
