"""Coverage of modules and functions between the layers of an eager network."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qat_lightning.graph.example import Example
from qat_lightning.layers.operators import MOVES, WEIGHTED, module_types
from qat_lightning.modes.coverage import (
    FloatRun,
    counter,
    flops_by_module,
    in_single_products,
    layers_with_macs,
    macs_of,
    merged,
)
from qat_lightning.modes.eager.observation import CHAIN_TYPES, Observation, function_name, observe
from qat_lightning.modes.own_weights import ParameterUses, float_rows
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.without_arithmetic import nested, on_a_copy

_LAYERS = (*CHAIN_TYPES, *module_types("table"))
"""Modules watched by an observation that have a row as a layer."""
_FUNCTION = "functions stay float in mode='eager'"
_ALONE = "it does not directly follow a single int8 layer whose kernel could include it"


class _BetweenLayers(TorchFunctionMode):
    """Records functions called between layers, and counts the floating point operations of each.

    Args:
        network: The network; hooks are added to its layers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.calls: list[str] = []
        self._inside = 0
        for module in network.modules():
            if isinstance(module, WEIGHTED):  # functions called inside are not reported separately
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function_name(func)
        if name is None or self._inside:
            return func(*args, **(kwargs or {}))
        with counter() as counted:
            result = func(*args, **(kwargs or {}))
        self.flops[name] += counted.get_total_flops()
        self.calls.append(name)
        return result


@torch.no_grad()
def eager_rows(
    layers: list[LayerCoverage],
    float_network: nn.Module,
    plan: Mapping[str, Any],
    example: Example,
    selects: Callable[[str], bool],
) -> tuple[list[LayerCoverage], list[LayerCoverage]]:
    """The rows of layers, with their multiply-accumulates, and rows of modules and functions between them.

    Between layers there is one row for each activation and BatchNorm that is in no chain, and one for each function.
    Custom modules that multiply by a weight of their own get rows as layers.

    Args:
        layers: One row per layer.
        float_network: Not changed.
        plan: The int8 chains.
        example: One call.
        selects: Whether a module is to be quantized, by its name.
    """
    try:
        seen = on_a_copy(float_network, lambda network, context: _look(network, context, example))
    except Exception as error:  # noqa: BLE001 - a report must not cost a training or a conversion
        warnings.warn(f"There is no report of the ops: {type(error).__name__}: {error}", stacklevel=2)
        return layers, []
    layers = [*layers_with_macs(layers, seen.run, example), *float_rows(float_network, seen.run.custom, selects)]
    return layers, _operations(seen, plan, example)


@dataclass(frozen=True)
class _Seen:
    """The calls of a network, the names of its modules, and the operations between and inside its layers."""

    observation: Observation
    names: dict[nn.Module, str]
    between: _BetweenLayers
    run: FloatRun


def _operations(seen: _Seen, plan: Mapping[str, Any], example: Example) -> list[LayerCoverage]:
    observation, names, between = seen.observation, seen.names, seen.between
    in_chains = {name for chain in plan["chains"] for name in _parts(chain)}
    on_grid = _outputs(observation, names, plan)
    rows = []
    for call in observation.calls:
        if isinstance(call.module, _LAYERS) or (call.module is None and call.function in MOVES):
            continue
        if call.module is not None:
            if names[call.module] not in in_chains:
                rows.append(LayerCoverage(names[call.module], call.function, False, _ALONE, what="op"))
            continue
        pooled = call.function == "max_pool2d" and set(call.inputs) <= on_grid
        rows.append(LayerCoverage(call.function, call.function, pooled, "" if pooled else _FUNCTION, what="op"))
    outside = Counter(between.calls)
    return [_with_macs(row, between.flops, example) for row in _outside(merged(rows), outside)]


def _look(network: nn.Module, context: AbstractContextManager[Any], example: Example) -> _Seen:
    between, counted, uses = _BetweenLayers(network), counter(), ParameterUses(network)
    with in_single_products():
        observation = observe(network, example, nested(context, counted, between, uses), heads=CHAIN_TYPES)
    names = {module: name for name, module in network.named_modules()}
    run = FloatRun(uses.used, flops_by_module(network, counted), uses.of_custom_modules())
    return _Seen(observation, names, between, run)


def _outside(rows: list[LayerCoverage], calls: Mapping[str, int]) -> Iterator[LayerCoverage]:
    """The rows of modules, and of functions with their calls outside of layers."""
    left = Counter(calls)
    for row in rows:
        if row.name != row.kind:
            yield row
        elif left[row.name]:
            count = min(row.calls, left[row.name])
            left[row.name] -= count
            yield replace(row, calls=count)


def _parts(chain: Mapping[str, Any]) -> list[str]:
    return [name for name in (chain["name"], chain["batchnorm"], chain["activation"]) if name is not None]


def _outputs(observation: Observation, names: Mapping[nn.Module, str], plan: Mapping[str, Any]) -> set[Any]:
    """The output tensors of chains."""
    ends = {_parts(chain)[-1] for chain in plan["chains"]}
    return {
        key
        for call in observation.calls
        if call.module is not None and names[call.module] in ends
        for key in call.outputs
    }


def _with_macs(row: LayerCoverage, flops: Mapping[str, int], example: Example) -> LayerCoverage:
    if row.name != row.kind:
        return row
    return replace(row, macs=macs_of(flops.get(row.name, 0), example))
