"""Lowering a decomposed graph to oneDNN's int8 kernels for plain tensors.

Each convolution or linear layer between dequantize and quantize becomes one op with uint8 inputs and outputs. An
activation is fused into it, and so is an addition after a convolution. Ops between the layers stay in float, as in the
graph.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from qat_lightning.checks import LayerCheck
from qat_lightning.graph.scopes import scope_of
from qat_lightning.modes.decomposed.ops import DEQUANTIZE, QUANTIZE
from qat_lightning.modes.decomposed.plain import Behind, Grid, PlainLayer, dequantize, in_order, quantize
from qat_lightning.modes.judging import is_faulty
from qat_lightning.modes.recording import RunsApart
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.engines import overflows

_aten = torch.ops.aten
_QUANTIZE, _DEQUANTIZE = QUANTIZE[0], DEQUANTIZE[0]
_DEQUANTIZE_DYNAMIC = torch.ops.quantized_decomposed.dequantize_per_tensor.tensor
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)
_RELU = (_aten.relu.default, _aten.relu_.default)
_HARDTANH = (_aten.hardtanh.default, _aten.hardtanh_.default)
_ADD = (_aten.add.Tensor, _aten.add_.Tensor)
_INTEGERS = (torch.uint8, torch.int8)
_READS_STRIDES = (
    _aten.view.default,
    _aten.view.dtype,
    _aten._unsafe_view.default,
    _aten.as_strided.default,
    _aten.view_as_complex.default,
)
"""Ops that fail, or compute something else, in another memory format than that in which the graph was captured."""

_LEAST_DB = 90.0
"""Least SQNR of a layer with float output: float kernels may differ in the order of sums."""


@dataclass(frozen=True)
class _Candidate:
    """A way to run a layer.

    Attributes:
        layer: The layer with the ops fused into it.
        given: Nodes of the integers that it reads.
        end: The node whose value it computes.
    """

    layer: PlainLayer
    given: tuple[fx.Node, ...]
    end: fx.Node


@torch.no_grad()
def on_plain_kernels(decomposed: fx.GraphModule, tensors: list[Tensor], target: Backend) -> fx.GraphModule:
    """A decomposed graph whose layers are replaced by oneDNN's int8 kernels.

    Each layer is compared with the ops that it replaces, on their own inputs, with as many ops fused as possible. If it
    computes something else, or oneDNN does not support it, fewer ops are fused, and in the end the original ops stay.

    Args:
        decomposed: Quantize, dequantize and plain ops; not changed.
        tensors: Its inputs in a real call.
        target: The backend, for its tolerance.
    """
    layers = [found for node in decomposed.graph.nodes if (found := list(_candidates(node, decomposed)))]
    comparison = _Comparison(decomposed, [candidate for found in layers for candidate in found], target)
    comparison.run(*tensors)
    chosen = [next((candidate for candidate in found if id(candidate) in comparison.right), None) for found in layers]
    names = dict[fx.Node, fx.Node]()
    graph = fx.Graph()
    output = graph.graph_copy(decomposed.graph, names)
    graph.output(output)
    lowered = fx.GraphModule(decomposed, graph)
    ends = {candidate.end for candidate in chosen if candidate is not None}
    for count, candidate in enumerate(one for one in chosen if one is not None):
        lowered.add_module(f"_plain_{count}", candidate.layer)
        end = names[candidate.end]
        with graph.inserting_before(end):
            made = graph.call_module(f"_plain_{count}", tuple(names[node] for node in candidate.given))
            if _strides_are_read(candidate.end, ends):
                made = graph.call_function(in_order, (made, comparison.orders[candidate.end]))
        end.replace_all_uses_with(made)
        names[candidate.end] = made
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target in (_QUANTIZE, _DEQUANTIZE):
            node.target = quantize if node.target is _QUANTIZE else dequantize
    _overwrite_unread_summands(lowered)
    lowered.delete_all_unused_submodules()
    lowered.recompile()
    return lowered


def _strides_are_read(end: fx.Node, ends: set[fx.Node]) -> bool:
    """Whether an op reads the strides of a layer's output, or of what is computed from it before the next layer."""
    seen, waiting = set[fx.Node](), list(end.users)
    while waiting:
        user = waiting.pop()
        if user.target in _READS_STRIDES:
            return True
        if user not in seen and user not in ends:
            waiting += user.users
        seen.add(user)
    return False


def overflowing_layer(decomposed: fx.GraphModule) -> str:
    """The first layer whose products may overflow in oneDNN's kernels on this CPU; empty if there is none."""
    for node in decomposed.graph.nodes:
        if node.target not in (*_CONVOLUTIONS, _aten.linear.default):
            continue
        source, weight = node.args[:2]
        reads_integers = isinstance(source, fx.Node) and source.target in (_DEQUANTIZE, _DEQUANTIZE_DYNAMIC)
        taken = _weight(weight, decomposed) if reads_integers else None
        if taken is not None and overflows(taken[0]):
            return scope_of(node) or str(node.name)
    return ""


def _overwrite_unread_summands(lowered: fx.GraphModule) -> None:
    """Let fused additions overwrite a summand that has memory of its own and is not read later."""
    called = [node for node in lowered.graph.nodes if node.op == "call_module"]
    modules = {node: lowered.get_submodule(str(node.target)) for node in called}
    layers = {node: module for node, module in modules.items() if isinstance(module, PlainLayer)}
    for node, layer in layers.items():
        if layer.behind.added is None:
            continue
        added: Any = node.args[1]
        own = added in layers or added.target is quantize
        others = [user for user in added.users if user is not node]
        done = all((user in layers or user.target is dequantize) and user < node for user in others)
        layer.behind = replace(layer.behind, copies=not (own and done and added is not node.args[0]))


class _Comparison(RunsApart):
    """Runs a decomposed graph, and finds which candidates compute the same as the ops they replace.

    Args:
        decomposed: The graph; values that no candidate needs are freed while it runs.
        candidates: Ways to run its layers.
        target: The backend, for its tolerance.

    Attributes:
        right: Ids of the candidates that compute the same except for rounding.
        orders: The dimensions of the value at the end of each candidate, from the outermost in memory.
    """

    def __init__(self, decomposed: fx.GraphModule, candidates: list[_Candidate], target: Backend) -> None:
        super().__init__(decomposed)
        self.right = set[int]()
        self.orders: dict[fx.Node, tuple[int, ...]] = {}
        self._target = target
        self._ends: dict[fx.Node, list[_Candidate]] = defaultdict(list)
        self._waiting: dict[fx.Node, int] = defaultdict(int)
        self._held: dict[fx.Node, Tensor] = {}
        for candidate in candidates:
            self._ends[candidate.end].append(candidate)
            for node in candidate.given:
                self._waiting[node] += 1

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and compare the candidates that end there."""
        value = super().run_node(n)
        if n in self._waiting:
            self._held[n] = value
        if n in self._ends:
            self.orders[n] = tuple(sorted(range(value.dim()), key=lambda dim: -value.stride(dim)))
        for candidate in self._ends.get(n, ()):
            if self._computes(candidate, value):
                self.right.add(id(candidate))
            for node in candidate.given:
                self._waiting[node] -= 1
                if not self._waiting[node]:
                    del self._held[node]
        return value

    def _computes(self, candidate: _Candidate, wanted: Tensor) -> bool:
        layer = candidate.layer
        source, *added = (self._held[node] for node in candidate.given)
        if added and added[0].shape != wanted.shape:
            return False
        try:
            result = layer(source, *(tensor.clone() for tensor in added))
        except RuntimeError:  # oneDNN has no kernel for this shape or this fusion
            return False
        if layer.output is None:
            return sqnr_db(wanted, result) > _LEAST_DB
        grid = (layer.output.scale, layer.output.zero_point, 0, 0, wanted.dtype)
        steps = float((wanted.int() - result.int()).abs().max()) if result.numel() else 0.0
        check = LayerCheck(candidate.end.name, "", sqnr_db(dequantize(wanted, *grid), dequantize(result, *grid)), steps)
        return not is_faulty(check, self._target)


def _candidates(node: fx.Node, root: fx.GraphModule) -> Iterator[_Candidate]:
    """The ways to run the layer of a node, from most to fewest fused ops; empty if the node is not a layer."""
    if node.target not in (*_CONVOLUTIONS, _aten.linear.default) or node.kwargs:
        return
    source, weight, bias = (*node.args, None)[:3]
    given = _integers_of(source)
    taken, added = _weight(weight, root), None if bias is None else _constant(bias, root)
    if given is None or taken is None or (bias is not None and added is None) or overflows(taken[0]):
        return
    integers, grid = given
    try:
        layer = PlainLayer(*taken, added, grid, _sizes(node) if node.target in _CONVOLUTIONS else ())
    except (RuntimeError, AttributeError):  # oneDNN has no kernel for it, or this build of torch has no oneDNN
        return
    if node.target is _aten.conv2d.default and (summed := _summed(node)) is not None:
        behind, other, end = summed
        yield _Candidate(layer.followed_by(behind), (integers, other), end)
    for behind, end in _behind(node):
        yield _Candidate(layer.followed_by(behind), (integers,), end)


def _behind(node: fx.Node) -> Iterator[tuple[Behind, fx.Node]]:
    """The ops that can be fused into a layer without a second tensor, and the node at which they end."""
    activation = _only_user(node)
    if activation is not None and (named := _activation(activation)) is not None:
        if (last := _only_user(activation)) is not None and (grid := _quantized(last)) is not None:
            yield Behind(grid, *named), last
        yield Behind(None, *named), activation
    elif activation is not None and (grid := _quantized(activation)) is not None:
        yield Behind(grid), activation
    yield Behind(), node


def _summed(node: fx.Node) -> tuple[Behind, fx.Node, fx.Node] | None:
    """An addition of a convolution and a quantized tensor, an optional ReLU, and the grid after it.

    Returns:
        The fused ops, the node of the integers that are added, and the node at which they end.
    """
    add = _only_user(node)
    if add is None or add.target not in _ADD or add.kwargs or len(add.args) != 2:
        return None
    others = [arg for arg in add.args if arg is not node]
    given = _integers_of(others[0]) if len(others) == 1 else None
    last, activation = _only_user(add), "none"
    if last is not None and last.target in _RELU:
        last, activation = _only_user(last), "relu"
    output = None if last is None else _quantized(last)
    if given is None or last is None or output is None or given[1].dtype is not output.dtype:
        return None
    integers, grid = given
    return Behind(output, activation, (), grid), integers, last


def _integers_of(node: Any) -> tuple[fx.Node, Grid] | None:
    """The integers of a dequantized tensor, and their grid."""
    if not isinstance(node, fx.Node) or node.target is not _DEQUANTIZE or node.args[5] not in _INTEGERS:
        return None
    integers: Any = node.args[0]
    return integers, Grid(*node.args[1:])  # type: ignore[arg-type]


def _quantized(node: fx.Node) -> Grid | None:
    """The grid to which a node quantizes a tensor."""
    if node.target is not _QUANTIZE or node.args[5] not in _INTEGERS:
        return None
    return Grid(*node.args[1:])  # type: ignore[arg-type]


def _activation(node: fx.Node) -> tuple[str, tuple[float, ...]] | None:
    """An activation function by oneDNN's name, with its parameters."""
    if node.target in _RELU:
        return "relu", ()
    if node.target in _HARDTANH and not node.kwargs:
        limits: tuple[Any, ...] = (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :])
        return "hardtanh", (float(limits[0]), float(limits[1]))
    return None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    dims = 1 + _CONVOLUTIONS.index(node.target)
    given: tuple[Any, ...] = (*node.args[3:], *([1], [0], [1], 1)[len(node.args[3:]) :])
    return *(list(size) * (dims if len(size) == 1 else 1) for size in given[:3]), given[3]


def _weight(node: Any, root: fx.GraphModule) -> tuple[Tensor, Tensor] | None:
    """The integers and scales of a symmetric weight; None for any other."""
    if not isinstance(node, fx.Node) or node.target not in DEQUANTIZE:
        return None
    integers = _constant(node.args[0], root)
    if integers is None or integers.dtype is not torch.int8:
        return None
    if node.target is _DEQUANTIZE:
        scales, zero = torch.tensor([float(node.args[1])]), int(node.args[2])  # type: ignore[arg-type]
        return (integers, scales) if zero == 0 else None
    found, zeros = _constant(node.args[1], root), _constant(node.args[2], root)
    if found is None or node.args[3] != 0 or (zeros is not None and bool(zeros.any())):
        return None
    return integers, found


def _constant(node: Any, root: fx.GraphModule) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(root)
    return value if isinstance(value, Tensor) else None
