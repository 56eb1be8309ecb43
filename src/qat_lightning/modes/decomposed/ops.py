"""The ops of a decomposed graph: quantize, dequantize, and ops with a weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import fx

from qat_lightning.layers.operators import OPERATORS

quantized_decomposed = torch.ops.quantized_decomposed

QUANTIZE = (quantized_decomposed.quantize_per_tensor.default, quantized_decomposed.quantize_per_channel.default)
DEQUANTIZE = (quantized_decomposed.dequantize_per_tensor.default, quantized_decomposed.dequantize_per_channel.default)

CHANNEL_AXIS: dict[Any, int] = {
    overload: row.channel_axis for row in OPERATORS if row.channel_axis is not None for overload in row.overloads
}
"""The ops with a weight, and the output channel dimension of that weight."""


def main_op(node: fx.Node) -> fx.Node:
    """The op with a weight that is fused with ``node``; if there is none, ``node``."""
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        candidate = waiting.pop(0)
        if candidate in seen or candidate.op != "call_function" or candidate.target in DEQUANTIZE:
            continue
        if candidate.target in CHANNEL_AXIS:
            return candidate
        seen.add(candidate)
        waiting += candidate.all_input_nodes
    return node
