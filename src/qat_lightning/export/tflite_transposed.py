"""Rewriting transposed convolutions as convolutions and a shuffle: LiteRT's converter has no integer ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from qat_lightning.layers.subpixel import Subpixel

_ATEN, _OPS = torch.ops.aten, torch.ops.quantized_decomposed
_TRANSPOSED = {
    _ATEN.conv_transpose1d.default: _ATEN.conv1d.default,
    _ATEN.conv_transpose2d.input: _ATEN.conv2d.default,
}
_POINTWISE = {
    _ATEN.relu.default,
    _ATEN.relu_.default,
    _ATEN.relu6.default,
    _ATEN.hardtanh.default,
    _ATEN.hardtanh_.default,
}
"""Ops after a layer that stay attached to it; outputs are moved to their positions after them."""

_PAIR = (_OPS.quantize_per_tensor.default, _OPS.dequantize_per_tensor.default)
_DEQUANTIZES = (_PAIR[1], _OPS.dequantize_per_channel.default)
_DEFAULTS = (None, 1, 0, 0, 1, 1)


def without_transposed(graph_module: fx.GraphModule) -> None:
    """Rewrite transposed convolutions in place, as in `qat_lightning.layers.subpixel`.

    Weights keep their integers and scales. Outputs are quantized as before, and then moved to their positions.

    Args:
        graph_module: From `qat_lightning.export.pt2.flat_graph`.

    Example:
        >>> layer, x = torch.nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), torch.randn(1, 2, 4, 4)
        >>> graph_module = torch.export.export(layer, (x,)).module(check_guards=False)
        >>> without_transposed(graph_module)
        >>> graph_module.graph.find_nodes(op="call_function", target=_ATEN.conv_transpose2d.input)
        []
        >>> torch.allclose(graph_module(x), layer(x), atol=1e-6)
        True
    """
    for target in _TRANSPOSED:
        for node in graph_module.graph.find_nodes(op="call_function", target=target):
            _rewrite(graph_module, node)
    graph_module.recompile()


def _rewrite(graph_module: fx.GraphModule, node: fx.Node) -> None:
    arguments: list[Any] = [*node.args, *_DEFAULTS[len(node.args) - 2 :]]
    x, weight, bias, stride, padding, extra, groups, dilation = arguments
    held = weight.args[0] if weight.target in _DEQUANTIZES else weight
    constants = [argument for argument in (held, bias) if argument is not None]
    if any(argument.op != "get_attr" for argument in constants):
        return
    values = [_value(graph_module, argument) for argument in constants]
    dims = values[0].dim() - 2
    steps, around, more, spread = (_of_each(value, dims) for value in (stride, padding, extra, dilation))
    subpixel = Subpixel.of(tuple(values[0].shape[2:]), steps, around, more, spread, groups)
    with node.graph.inserting_before(node):
        made = _constant(graph_module, f"_moved_{node.name}", subpixel.weight(values[0]))
        if held is not weight:
            made = _dequantized(graph_module, weight, made, subpixel)
        added = None if bias is None else _constant(graph_module, f"_bias_{node.name}", subpixel.bias(values[1]))
        ones = (1,) * dims
        given = (x, made, added, ones, subpixel.padding, ones, groups)
        convolution = node.graph.call_function(_TRANSPOSED[node.target], given)  # type: ignore[index]
    node.replace_all_uses_with(convolution)
    node.graph.erase_node(node)
    for end in _ends(convolution):
        _move(end, subpixel)


def _dequantized(graph_module: fx.GraphModule, before: Any, integers: fx.Node, subpixel: Subpixel) -> fx.Node:
    """Return the dequantize op for a weight's integers in another order."""
    graph = graph_module.graph
    if before.target is _PAIR[1]:
        return graph.call_function(_PAIR[1], (integers, *before.args[1:]))
    grid = [
        _constant(
            graph_module,
            f"_moved_{argument.name}",
            subpixel.bias(_value(graph_module, argument).repeat(subpixel.groups)),
        )
        for argument in before.args[1:3]
    ]
    return graph.call_function(before.target, (integers, *grid, 0, *before.args[4:]))


def _move(end: fx.Node, subpixel: Subpixel) -> None:
    """Move the outputs to their positions after a node; if that node is quantized, mark the result as well."""
    readers, moved = list(end.users), end
    for name, arguments in subpixel.moves():
        for target, given in _calls(name, arguments):
            with end.graph.inserting_after(moved):
                moved = end.graph.call_function(target, (moved, *given))
    if end.target is _PAIR[1]:
        for target in _PAIR:
            with end.graph.inserting_after(moved):
                moved = end.graph.call_function(target, (moved, *end.args[1:]))
    for reader in readers:
        reader.replace_input_with(end, moved)


def _calls(name: str, arguments: Sequence[Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Translate a move of `Subpixel.moves` into ops and their arguments after the tensor."""
    if name == "unflatten":
        return [(_ATEN.unflatten.int, tuple(arguments))]
    if name == "permute":
        return [(_ATEN.permute.default, (arguments,))]
    if name == "flatten":
        return [(_ATEN.flatten.using_ints, tuple(arguments))]
    (slices,) = arguments
    return [
        (_ATEN.slice.Tensor, (axis, part.start or 0, part.stop))
        for axis, part in enumerate(slices)
        if part != slice(None)
    ]


def _ends(node: fx.Node) -> list[fx.Node]:
    """Return the nodes with the final outputs of a layer's kernel: after its activation and quantization."""
    while len(node.users) == 1 and (reader := next(iter(node.users))).target in _POINTWISE:
        node = reader
    readers = list(node.users)
    return list(readers[0].users) if len(readers) == 1 and readers[0].target is _PAIR[0] else [node]


def _value(graph_module: fx.GraphModule, node: Any) -> Tensor:
    found: Any = graph_module
    for name in node.target.split("."):
        found = getattr(found, name)
    value: Tensor = found.detach()
    return value


def _constant(graph_module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    graph_module.register_buffer(name, value.contiguous())
    return graph_module.graph.get_attr(name)


def _of_each(value: Any, dims: int) -> tuple[int, ...]:
    """Return a size for each dimension."""
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes
