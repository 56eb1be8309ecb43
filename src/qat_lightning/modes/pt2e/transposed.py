"""Transposed convolutions in an exported graph, replaced by plain ones, which x86's quantizer supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
_ANY_LAYOUT = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
"""What a trace in one memory format makes of ``reshape``, and an op that works for a parameter in any format."""

_END = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Shuffled:
    """The replacement of a transposed convolution.

    Attributes:
        convolution: Its channels are the phases of each channel of the transposed one, side by side.
        moves: Ops that move its outputs to their places, in order; may be empty.
        phases: Number of its channels per channel of the transposed one.
    """

    convolution: fx.Node
    moves: tuple[fx.Node, ...]
    phases: int

    @property
    def last(self) -> fx.Node:
        """The node with the value of the transposed convolution."""
        return (self.convolution, *self.moves)[-1]


def write_as_convolutions(graph: fx.Graph, selects: Callable[[fx.Node], bool]) -> list[Shuffled]:
    """Replace transposed convolutions by plain ones and ops that move their outputs.

    Args:
        graph: An exported graph, with the example's shapes in its nodes; changed in place.
        selects: Whether the code that created a node is to be quantized.

    Returns:
        The replacements. Layers are not replaced if their input is one sample without a batch, whose channel dimension
        differs, or if their weight depends on the network's input and so has no fixed grid.
    """
    return [
        _write(graph, node)
        for node in list(graph.nodes)
        if node.op == "call_function"
        and node.target in _CONVOLUTIONS
        and not node.kwargs
        and selects(node)
        and _is_batch(node)
        and not _depends_on_input(node.args[1])
    ]


def _is_batch(node: fx.Node) -> bool:
    given: Any = node.args[0]
    return bool(given.meta["val"].dim() == 2 + _CONVOLUTIONS[node.target][1])


def _depends_on_input(node: Any) -> bool:
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        source = waiting.pop()
        if source.op == "placeholder":
            return True
        if source not in seen:
            seen.add(source)
            waiting += source.all_input_nodes
    return False


def _write(graph: fx.Graph, node: fx.Node) -> Shuffled:
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
    moves: list[fx.Node] = []
    with graph.inserting_before(node):
        weight = _computed(graph, subpixel.weight, weight)
        bias = None if bias is None else _computed(graph, subpixel.bias, bias)
        arguments = (x, weight, bias, ones, list(subpixel.padding), ones, groups)
        last = layer = _call(graph, node, convolution, arguments)
        for name, values in subpixel.moves():
            for target, others in _ops(name, values):
                last = _call(graph, node, target, (last, *others))
                moves.append(last)
    node.replace_all_uses_with(last)
    graph.erase_node(node)
    return Shuffled(layer, tuple(moves), subpixel.phases)


def _ops(name: str, values: tuple[Any, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
    """The ops of one of `Subpixel.moves`, with their arguments besides the input."""
    if name == "getitem":
        return [
            (aten.slice.Tensor, (dim, kept.start or 0, _END if kept.stop is None else kept.stop))
            for dim, kept in enumerate(values[0])
            if kept != slice(None)
        ]
    given = (values,) if name == "permute" else values
    return [(_MOVES[name], tuple(list(value) if isinstance(value, tuple) else value for value in given))]


def _computed(graph: fx.Graph, function: Callable[[Tensor], Tensor], source: fx.Node) -> fx.Node:
    """Apply a function to a parameter, op by op; the result is named after the parameter."""
    value = source.meta["val"]
    traced = make_fx(lambda parameter: function(parameter))(torch.empty(value.shape, dtype=value.dtype))
    (given,) = traced.graph.find_nodes(op="placeholder")
    result = traced.graph.output_node().args[0]
    nodes = {given: source}
    for op in traced.graph.nodes:
        if op.op == "call_function":
            arguments = fx.node.map_arg((op.args, op.kwargs), nodes.__getitem__)
            name = f"{source.name}_of_phases" if op is result else None
            nodes[op] = _call(graph, source, _ANY_LAYOUT.get(op.target, op.target), *arguments, name=name)
    return nodes[result]


def _call(
    graph: fx.Graph, like: fx.Node, target: Any, args: Any, kwargs: Any = None, name: str | None = None
) -> fx.Node:
    """Add an op, with its shape, in the module that created another node."""
    new = graph.create_node("call_function", target, args, kwargs or {}, name=name)
    new.meta = {key: value for key, value in like.meta.items() if key not in ("source_fn_stack", "torch_fn", "val")}
    values = fx.node.map_arg((new.args, new.kwargs), lambda node: node.meta["val"])
    fake_mode = next(iter(new.all_input_nodes)).meta["val"].fake_mode
    with fake_mode:
        new.meta["val"] = target(*values[0], **values[1])
    return new
