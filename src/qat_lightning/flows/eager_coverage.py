"""Which modules and functions between the layers of an eager network are int8."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from qat_lightning.flows.base import Example, LayerCoverage
from qat_lightning.flows.coverage import MOVES, macs_of, merged
from qat_lightning.flows.eager_chains import HEAD_TYPES, Observation, function_name, observe, run_apart

_FUNCTION = "functions stay float in mode='eager'"
_ALONE = "it does not follow one int8 layer directly, whose kernel would do it"


_OF_LAYERS = frozenset(
    {"embedding", "embedding_bag", "lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward"}
)
"""What layers call that are reported as layers."""


class _FunctionFlops(TorchFunctionMode):
    """Counts the floating point operations of each function, those that modules call included."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function_name(func)
        if name is None:
            return func(*args, **(kwargs or {}))
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **(kwargs or {}))
        self.flops[name] += counter.get_total_flops()
        return result


@torch.no_grad()
def eager_operations(float_network: nn.Module, plan: Mapping[str, Any], example: Example) -> list[LayerCoverage]:
    """A row for each activation and BatchNorm that is in no chain, and one for each function.

    Args:
        float_network: Left as it is.
        plan: The chains that are int8.
        example: One call.
    """
    network = copy.deepcopy(float_network).cpu().float()
    observation = observe(network, example)
    counting = _FunctionFlops()
    run_apart(network, example, counting)
    names = {module: name for name, module in network.named_modules()}
    in_chains = {name for chain in plan["chains"] for name in _parts(chain)}
    on_grid = _outputs(observation, names, plan)
    rows = []
    for call in observation.calls:
        if isinstance(call.module, HEAD_TYPES) or (call.module is None and call.function in MOVES | _OF_LAYERS):
            continue
        if call.module is not None:
            if names[call.module] not in in_chains:
                rows.append(LayerCoverage(names[call.module], call.function, False, _ALONE, what="op"))
            continue
        pooled = call.function == "max_pool2d" and set(call.inputs) <= on_grid
        rows.append(LayerCoverage(call.function, call.function, pooled, "" if pooled else _FUNCTION, what="op"))
    return [_with_macs(row, counting.flops, example) for row in merged(rows)]


def _parts(chain: Mapping[str, Any]) -> list[str]:
    return [name for name in (chain["name"], chain["batchnorm"], chain["activation"]) if name is not None]


def _outputs(observation: Observation, names: Mapping[nn.Module, str], plan: Mapping[str, Any]) -> set[Any]:
    """The tensors that come out of chains."""
    ends = {_parts(chain)[-1] for chain in plan["chains"]}
    return {
        key
        for call in observation.calls
        if call.module is not None and names[call.module] in ends
        for key in call.outputs
    }


def _with_macs(row: LayerCoverage, flops: Mapping[str, int], example: Example) -> LayerCoverage:
    # Those of linear and convolution functions are the layers' for the most part, which have them already.
    if row.name.startswith(("linear", "conv")) or "." in row.name:
        return row
    return LayerCoverage(
        row.name, row.kind, row.quantized, row.reason, what="op", calls=row.calls,
        macs=macs_of(flops.get(row.name, 0), example),
    )  # fmt: skip
