"""Integer weights and dynamic rounding as nodes of an exported graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from qat_lightning.layers.integer.weights import WeightGrid

aten = torch.ops.aten
ops = torch.ops.quantized_decomposed

EPS = float(torch.finfo(torch.float32).eps)
"""The smallest scale that upstream computes for a range."""


def _constant(graph_module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    name = name.replace(".", "_")
    while hasattr(graph_module, name):
        name += "_"
    graph_module.register_buffer(name, value)
    return graph_module.graph.get_attr(name)


def integer_weight(
    graph_module: fx.GraphModule, name: str, quantized: tuple[Tensor, Tensor], grid: WeightGrid
) -> fx.Node:
    """A weight as int8 constants with one scale per output, dequantized before the kernel.

    Args:
        graph_module: The constants are registered here; nodes are inserted at its graph's insertion point.
        name: Name of the weight.
        quantized: Its integers and scales.
        grid: Their grid.
    """
    integers, scales = quantized
    parts = [
        _constant(graph_module, f"{name}_integers", integers),
        _constant(graph_module, f"{name}_scales", scales),
        _constant(graph_module, f"{name}_zero_points", torch.zeros_like(scales, dtype=torch.int64)),
    ]
    return graph_module.graph.call_function(
        ops.dequantize_per_channel.default, (*parts, 0, grid.quant_min, grid.quant_max, torch.int8)
    )


def rounded_dynamically(graph: fx.Graph, source: Any, limits: tuple[int, int, torch.dtype]) -> fx.Node:
    """Round a value to a range that is computed in each call.

    Args:
        graph: The graph to insert into.
        source: The value.
        limits: Smallest and largest integer, and their dtype.
    """
    low, high, dtype = limits
    qparams = graph.call_function(ops.choose_qparams.tensor, (source, low, high, EPS, dtype))
    scale = graph.call_function(operator.getitem, (qparams, 0))
    zero_point = graph.call_function(operator.getitem, (qparams, 1))
    grid = (scale, zero_point, low, high, dtype)
    integers = graph.call_function(ops.quantize_per_tensor.tensor, (source, *grid))
    return graph.call_function(ops.dequantize_per_tensor.tensor, (integers, *grid))


def dequantized(
    graph_module: fx.GraphModule,
    name: str,
    parts: tuple[Tensor, Tensor, Tensor | None],
    shape: torch.Size,
    groups: int,
    grid: WeightGrid,
) -> fx.Node:
    """`dequantize_rows` and `weight_of_rows` as nodes."""
    stored, scales, points = parts
    graph, rows = graph_module.graph, stored.shape[0]
    call = graph.call_function
    node = _constant(graph_module, f"{name}_integers", stored)
    if grid.packs:
        low = call(aten.bitwise_and.Scalar, (node, 15))
        high = call(aten.bitwise_right_shift.Tensor_Scalar, (node, 4))
        both = call(aten.stack.default, ([low, high], -1))
        node = call(aten.sub.Scalar, (_float(graph, both), 8.0))
    else:
        node = _float(graph, node)
    values = shape.numel() // rows
    if grid.packs and values % 2:
        node = call(aten.slice.Tensor, (call(aten.reshape.default, (node, [rows, -1])), 1, 0, values))
    if grid.padding(values):
        padded = (call(aten.reshape.default, (node, [rows, -1])), [0, grid.padding(values)])
        node = call(aten.constant_pad_nd.default, padded)
    node = call(aten.reshape.default, (node, [rows, scales.shape[1], -1]))
    if points is not None:
        offset = _float(graph, _constant(graph_module, f"{name}_zero_points", points[..., None]))
        node = call(aten.sub.Tensor, (node, offset))
    node = call(aten.mul.Tensor, (node, _constant(graph_module, f"{name}_scales", scales[..., None])))
    node = call(aten.reshape.default, (node, [rows, -1]))
    node = call(aten.slice.Tensor, (node, 1, 0, values))
    if groups:
        node = call(aten.reshape.default, (node, [groups, shape[1], shape[0] // groups, -1]))
        node = call(aten.transpose.int, (node, 1, 2))
    return call(aten.reshape.default, (node, list(shape)))


def _float(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})
