"""Rewriting the graph of a quantized network for LiteRT's converter, so that it creates int8 kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import fx

from qat_lightning.artifact.operations import words
from qat_lightning.errors import ExportError

_OPS = torch.ops.quantized_decomposed
_QUANTIZE_OF = {
    _OPS.dequantize_per_tensor.default: _OPS.quantize_per_tensor.default,
    _OPS.dequantize_per_channel.default: _OPS.quantize_per_channel.default,
}
_ATEN = torch.ops.aten
_KEEPS = {getattr(_ATEN, name).default for name in words("alias clone contiguous detach dropout lift_fresh_copy")}
"""Ops of exported programs that return their input unchanged."""
_NEUTRAL = {_ATEN.mul.Tensor: 1, _ATEN.div.Tensor: 1, _ATEN.add.Tensor: 0, _ATEN.sub.Tensor: 0}
_AVERAGES = (_ATEN.avg_pool2d.default, _ATEN.upsample_bilinear2d.vec)
_CHOICES = {_ATEN.cat.default, _ATEN.where.self}
"""Ops that return values selected from several tensors."""

_LEAST = -3.0e38
_PAIR = (_OPS.quantize_per_tensor.default, _OPS.dequantize_per_tensor.default)
_FULL = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
_SHIFT = 128


def for_litert(graph_module: fx.GraphModule) -> None:
    """Rewrite a graph of flat tensors in place.

    LiteRT's kernels take int8 activations, and weights from -127 to 127 with zero point 0. A uint8 grid has the same
    values as the int8 grid with the zero point 128 less, so no value is rounded again. Integer constants before a
    dequantize op become float constants before a quantize and a dequantize op, because the converter recognizes weights
    only in such a pair.

    Args:
        graph_module: From `qat_lightning.export.pt2.flat_graph`.

    Raises:
        ExportError: LiteRT's int8 kernels do not support the grid of an activation or a weight.

    Example:
        >>> grid = (0.5, 128, 0, 255, torch.uint8)
        >>> def pair(x: Tensor) -> Tensor:
        ...     return _OPS.dequantize_per_tensor.default(_OPS.quantize_per_tensor.default(x, *grid), *grid)
        >>> graph_module = fx.symbolic_trace(pair)
        >>> for_litert(graph_module)
        >>> [node.args[1:] for node in graph_module.graph.nodes if node.op == "call_function"][0]
        (0.5, 0, -128, 127, torch.int8)
        >>> graph_module(torch.tensor([0.6, -80.0]))
        tensor([  0.5000, -64.0000])
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target in _QUANTIZE_OF and _is_constant(node.args[0]):
            _as_pair(graph_module, node)
        elif node.target in _PAIR:
            _as_int8(node)
    for node in list(graph.find_nodes(op="call_function", target=_PAIR[0])):
        apart(node)
    for node in list(graph.find_nodes(op="call_function", target=_PAIR[1])):
        _one_each(node)
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def apart(quantize: fx.Node) -> None:
    """Keep the converter from merging the grid of a quantize op with that of its input.

    The converter drops a quantize op that follows a dequantize op, even if their grids differ, and then gives the next
    layer a bias for the wrong grid. A maximum with the lowest number separates the two;
    `qat_lightning.export.tflite_rewrites` removes it from the file. The same applies to averages, and to ops that
    select values from several tensors.

    Args:
        quantize: A ``quantize_per_tensor`` node.
    """
    source = quantize.args[0]
    while isinstance(source, fx.Node) and _changes_nothing(source):
        source = source.args[0]
    assert isinstance(source, fx.Node)
    if source.target is _PAIR[1] or source.target in _AVERAGES:
        _hold_apart(quantize)
    elif source.target in _CHOICES:
        grids = {node.args[1:] if node.target is _PAIR[1] else None for node in _chosen(source)}
        if len(grids) == 1 and None not in grids and quantize.args[1:] not in grids:
            _on_grid(source, grids.pop())
            _hold_apart(quantize)


def _chosen(node: fx.Node) -> list[fx.Node]:
    """Return the tensors from which one of `_CHOICES` selects values."""
    return list(node.args[0]) if node.target is _ATEN.cat.default else list(node.args[1:])  # type: ignore[arg-type]


def _on_grid(node: fx.Node, grid: Any) -> None:
    """Mark the values of a node as quantized with a grid."""
    with node.graph.inserting_after(node):
        integers = node.graph.call_function(_PAIR[0], (node, *grid))
    with node.graph.inserting_after(integers):
        restored = node.graph.call_function(_PAIR[1], (integers, *grid))
    node.replace_all_uses_with(restored, lambda user: user is not integers)


def _hold_apart(quantize: fx.Node) -> None:
    graph = quantize.graph
    # A different number each time: if two nodes share one, the converter looks for a common grid.
    least = _LEAST * (1 - len(graph.find_nodes(op="call_function", target=_ATEN.clamp.default)) * 2**-20)
    with graph.inserting_before(quantize):
        given = graph.call_function(_ATEN.clamp.default, (quantize.args[0], least))
    quantize.args = (given, *quantize.args[1:])


def _one_each(dequantize: fx.Node) -> None:
    """Give each reader its own dequantize op: if two share one, the converter may lose track of the axes."""
    for reader in list(dequantize.users)[1:]:
        with dequantize.graph.inserting_after(dequantize):
            reader.replace_input_with(dequantize, dequantize.graph.node_copy(dequantize))


def _changes_nothing(node: fx.Node) -> bool:
    for target, neutral in _NEUTRAL.items():
        if node.target is target:
            return isinstance(node.args[1], (int, float)) and node.args[1] == neutral
    return node.target in _KEEPS


def _as_int8(node: fx.Node) -> None:
    source, scale, zero_point, low, high, dtype = node.args
    if _FULL.get(dtype) != (low, high):  # type: ignore[arg-type]
        raise ExportError(
            f"LiteRT's int8 kernels use all of their 8 bits, and {node.name!r} is {dtype} from {low} to {high}: use a "
            "scheme of activation_bits=8."
        )
    shift = _SHIFT if dtype == torch.uint8 else 0
    node.args = (source, scale, zero_point - shift, *_FULL[torch.int8], torch.int8)  # type: ignore[operator]


def _as_pair(graph_module: fx.GraphModule, node: fx.Node) -> None:
    integers, *grid = (_value(graph_module, argument) for argument in node.args)
    name = f"_float_{node.name}"
    graph_module.register_buffer(name, node.target(integers, *grid))  # type: ignore[operator]
    zero_points = torch.as_tensor(grid[1])
    if integers.dtype == torch.int8 and not zero_points.any() and int(integers.min()) >= -127:
        where = node.args[1:-3]  # a weight; kernels assume it contains no -128
        node.args = (node.args[0], *where, -127, 127, torch.int8)
    elif zero_points.dim() == 0:
        _as_int8(node)  # a tensor of the network's own, handled like an activation
    else:
        raise ExportError(
            f"LiteRT's int8 kernels need weights from -127 to 127 with zero point 0, which those of {node.name!r} are "
            "not: use a scheme of weight_symmetric=True."
        )
    with graph_module.graph.inserting_before(node):
        constant = graph_module.graph.get_attr(name)
        quantize: Any = _QUANTIZE_OF[node.target]  # type: ignore[index]
        node.args = (graph_module.graph.call_function(quantize, (constant, *node.args[1:])), *node.args[1:])


def _is_constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _value(graph_module: fx.GraphModule, argument: Any) -> Any:
    if not _is_constant(argument):
        return argument
    found: Any = graph_module
    for name in argument.target.split("."):
        found = getattr(found, name)
    return found
