"""The kernels of an int8 network as ops between quantize and dequantize ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.export.spelling import Spelling
from qat_lightning.graph.example import Example
from qat_lightning.graph.signature import batch_size, has_batch
from qat_lightning.modes.graph_network import GraphNetwork


def in_plain_ops(quantized: QuantizedNetwork, call: Example, spell: Spelling | None = None) -> nn.Module:
    """Replace the packed kernels of a network of mode eager or fx by ops between quantize and dequantize ops.

    Args:
        quantized: The int8 network; not changed.
        call: A real call, on which each op is compared with its kernel.
        spell: See `int8_program`.

    Raises:
        ExportError: A kernel has no equivalent; the message names it.
    """
    inner, target = quantized.network, quantized.recipe.target
    if isinstance(inner, GraphNetwork):
        from qat_lightning.export.fx_program import fx_float_graph

        return fx_float_graph(inner, call, target, spell)
    from qat_lightning.export.eager_program import eager_float_network

    return eager_float_network(inner, call, target, spell)


def of_two(example: Example) -> tuple[Any, Any]:
    """Return the arguments of a call with a batch size of at least 2, since export treats a size of 1 as constant."""

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if has_batch(leaf, 1) else leaf

    arguments: tuple[Any, Any] = (example.args, example.kwargs)
    return tree_map(twice, arguments) if batch_size(example) == 1 else arguments
