"""Transposed convolutions in an exported graph: the convolution that stands for each, which x86's quantizer has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from qat_lightning.layers.subpixel import Subpixel

aten = torch.ops.aten

_CONVOLUTIONS: dict[Any, tuple[Any, int]] = {
    aten.conv_transpose1d.default: (aten.conv1d.default, 1),
    aten.conv_transpose2d.input: (aten.conv2d.default, 2),
}
_MOVES: dict[str, Any] = {
    "unflatten": aten.unflatten.int,
    "permute": aten.permute.default,
    "flatten": aten.flatten.using_ints,
}
COMPUTED = "weight_of_transposed"
"""Marks a convolution whose weight is computed of a transposed one's, into which no BatchNorm is folded."""

_END = torch.iinfo(torch.int64).max


def write_as_convolutions(graph: fx.Graph, selects: Callable[[fx.Node], bool]) -> None:
    """Put the convolution and the moves that stand for them in the place of transposed convolutions.

    Args:
        graph: As exported, with the shapes of the example in its nodes; changed in place.
        selects: Whether what made a node is to be quantized.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _CONVOLUTIONS and selects(node) and not node.kwargs:
            _write(graph, node)


def _write(graph: fx.Graph, node: fx.Node) -> None:
    convolution, dims = _CONVOLUTIONS[node.target]
    ones, zeros = [1] * dims, [0] * dims
    given: list[Any] = list(node.args)
    x, weight, bias, stride, padding, more, groups, dilation = (
        given + [None, ones, zeros, zeros, 1, ones][len(given) - 2 :]
    )
    kernel = [int(size) for size in weight.meta["val"].shape[2:]]
    numbers = ([*sizes] * dims if len(sizes) == 1 else [*sizes] for sizes in (stride, padding, more, dilation))
    steps, pads, further, spread = (tuple(sizes) for sizes in numbers)
    subpixel = Subpixel.of(kernel, steps, pads, further, spread, groups)
    with graph.inserting_before(node):
        weight = _computed(graph, subpixel.weight, weight)
        bias = None if bias is None else _computed(graph, subpixel.bias, bias)
        pads_of = list(subpixel.padding)
        last = _call(graph, node, convolution, (x, weight, bias, ones, pads_of, ones, groups))
        last.meta[COMPUTED] = True
        for name, arguments in subpixel.moves():
            if name != "getitem":
                sizes = (arguments,) if name == "permute" else arguments
                last = _call(graph, node, _MOVES[name], (last, *map(_listed, sizes)))
                continue
            for dim, kept in enumerate(arguments[0]):
                if kept != slice(None):
                    end = _END if kept.stop is None else kept.stop
                    last = _call(graph, node, aten.slice.Tensor, (last, dim, kept.start or 0, end))
    node.replace_all_uses_with(last)
    graph.erase_node(node)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _computed(graph: fx.Graph, function: Callable[[Tensor], Tensor], source: fx.Node) -> fx.Node:
    """What a function makes of a parameter, op by op."""
    value = source.meta["val"]
    traced = make_fx(lambda parameter: function(parameter))(torch.empty(value.shape, dtype=value.dtype))
    (given,) = traced.graph.find_nodes(op="placeholder")
    nodes = {given: source}
    for op in traced.graph.nodes:
        if op.op == "call_function":
            arguments = fx.node.map_arg((op.args, op.kwargs), nodes.__getitem__)
            nodes[op] = _call(graph, source, op.target, *arguments)
    return nodes[traced.graph.output_node().args[0]]


def _call(graph: fx.Graph, like: fx.Node, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
    """Add an op, with its shape, to the module that made another node."""
    new = graph.call_function(target, args, kwargs or {})
    new.meta = {key: value for key, value in like.meta.items() if key not in ("source_fn_stack", "torch_fn", "val")}
    values = fx.node.map_arg((new.args, new.kwargs), lambda node: node.meta["val"])
    fake_mode = next(iter(new.all_input_nodes)).meta["val"].fake_mode
    with fake_mode:
        new.meta["val"] = target(*values[0], **values[1])
    return new
