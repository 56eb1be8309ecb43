"""Rewriting the graph that upstream prepared: where ranges are observed, and which nodes the int8 graph omits."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.graph.training_flags import evaluating
from qat_lightning.layers.mode_layers import DropoutLike
from qat_lightning.layers.operators import faces_of, module_types, rows
from qat_lightning.layers.qat_modules import FoldedLayer
from qat_lightning.layers.relu_rounding import writes_in_place
from qat_lightning.modes.fx.config import LEFT_FLOAT, shares_range
from qat_lightning.modes.fx.operands import put_larger_first
from qat_lightning.modes.graph_network import GraphNetwork
from qat_lightning.modes.late_writes import late_write, late_write_error
from qat_lightning.modes.places import op_name
from qat_lightning.modes.recording import RunsApart
from qat_lightning.modes.shared_range import SharedRange, UnionObserver
from qat_lightning.modes.verify import Recorder, example_values
from qat_lightning.numerics.fake_quantize import FakeQuantize


@torch.no_grad()
def round_tensors_only(prepared: fx.GraphModule, network: nn.Module, example: Example) -> list[str]:
    """Remove roundings of numbers, shapes, integers and tensors whose precision differs from the network's.

    A trace has no types. Kernels round only float32, to which the network's own precision is converted.

    Returns:
        The names of additions and products of a tensor and a number, whose int8 kernels compute their own grid.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    own = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    with evaluating_with_folded(prepared, network):
        recorder = Recorder(prepared, prepared.graph)
        recorder.run(*example_values(prepared.graph, example))
    numbers = {
        name for name, value in recorder.values.items() if not (isinstance(value, torch.Tensor) and value.dtype == own)
    }
    for node in list(prepared.graph.nodes):
        if is_fake_quantize(node, modules) and node.args[0].name in numbers:
            node.replace_all_uses_with(node.args[0])
            prepared.graph.erase_node(node)
    put_larger_first(prepared.graph, recorder.values)
    prepared.recompile()
    return [
        node.name
        for node in prepared.graph.nodes
        if node.op == "call_function"
        and node.target in _BINARY
        and node.name not in numbers
        and sum(isinstance(arg, fx.Node) and arg.name not in numbers for arg in node.args) < 2
    ]


def scaled_sums(graph: fx.Graph) -> list[str]:
    """The names of all nodes that `is_scaled_sum`."""
    return [node.name for node in graph.nodes if is_scaled_sum(node)]


def is_scaled_sum(node: fx.Node) -> bool:
    """Whether a node adds with a factor, as in ``torch.add(x, y, alpha=2)``, which upstream's lowering would drop."""
    alpha = node.kwargs.get("alpha", 1)
    return node.target is torch.add and (isinstance(alpha, fx.Node) or bool(alpha != 1))


@torch.no_grad()
def refuse_late_writes(prepared: fx.GraphModule, network: nn.Module, example: Example, scopes: dict[str, Any]) -> None:
    """Raise an error for a write found by `late_write`.

    Args:
        prepared: The result of upstream's prepare.
        network: The float network.
        example: One call.
        scopes: The module whose ``forward`` created each node.

    Raises:
        TraceError: A rounded tensor is overwritten later.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    writes = {
        node: node.all_input_nodes[0]
        for node in prepared.graph.nodes
        if writes_in_place(node, modules.get(str(node.target))) and node.all_input_nodes
    }
    if not writes:
        return
    with evaluating_with_folded(prepared, network):
        memory = _Memory(prepared, garbage_collect_values=False)
        memory.run(*(copy.deepcopy(value) for value in example_values(prepared.graph, example)))
    found = late_write(prepared.graph, modules, writes, memory.of)
    if found is not None:
        rounded, write = found
        scope = scopes[write.name][0] if write.name in scopes else ""
        name = f"{write.name!r}{f' in {scope!r}' if scope else ''}"
        raise TraceError(late_write_error("fx", type(network).__name__, rounded.name, name))


class _Memory(RunsApart):
    """Runs a graph and records where the memory of each value begins."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        self.of: dict[fx.Node, Any] = {}
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            self.of[n] = value.untyped_storage().data_ptr()
        return value


@contextmanager
def evaluating_with_folded(*roots: nn.Module) -> Iterator[None]:
    """Within the block, all modules are in evaluation, including folded BatchNorms, which are not registered here."""
    layers = [module for root in roots for module in root.modules() if isinstance(module, FoldedLayer)]
    with evaluating(*roots, *(layer.batchnorm for layer in layers)):
        yield


_BINARY = (
    operator.add,
    operator.mul,
    torch.add,
    torch.mul,
    operator.iadd,
    operator.imul,
    operator.matmul,
    torch.matmul,
)


def pass_over_identities(graph_module: fx.GraphModule) -> None:
    """Bypass each ``nn.Identity``, so that the ops before and after it can be fused."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and type(graph_module.get_submodule(str(node.target))) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def calls_of(prepared: fx.GraphModule, chosen: list[nn.Module]) -> list[str]:
    """The names of the nodes that call one of ``chosen``."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    return [
        node.name
        for node in prepared.graph.nodes
        if node.op == "call_module" and any(modules[str(node.target)] is module for module in chosen)
    ]


def clamps(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    """The names of nodes that would run QNNPACK's clamp kernel, which misplaces channels-last values."""
    found = []
    for node in graph.nodes:
        if _kind(node, modules) in CLAMPS:
            found.append(node.name)
    return found


def with_own_grids(prepared: fx.GraphModule) -> list[str]:
    """The names of nodes whose int8 kernel computes its own grid, independent of fake-quant's."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    return [node.name for node in prepared.graph.nodes if _kind(node, modules) in OWN_GRIDS]


OWN_GRIDS = faces_of("hardsigmoid")

CLAMPS = tuple(face for row in rows("clamp") for face in row.faces)


def observe_only_before_dropout(prepared: fx.GraphModule) -> tuple[list[str], list[str]]:
    """Round before dropout instead of after it: its scaling in training never occurs in the int8 network.

    Returns:
        The names of dropouts, which the int8 graph omits, and of the roundings after them that training omits because
        they share a range with the rounding before.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    dropped: list[str] = []
    silent: list[str] = []
    for node in list(prepared.graph.nodes):
        if node.op != "call_module" or not isinstance(modules.get(str(node.target)), DROPOUT_MODULES):
            continue
        (before,) = node.all_input_nodes
        behind = [user for user in node.users if is_fake_quantize(user, modules)]
        if not is_fake_quantize(before, modules):
            if len(behind) != 1 or len(node.users) != 1:
                continue
            with prepared.graph.inserting_before(node):
                moved = prepared.graph.call_module(str(behind[0].target), (before,))
            node.replace_input_with(before, moved)
            before = moved
        for fq in behind:
            replaced = modules[str(fq.target)]
            fq.replace_all_uses_with(node)
            prepared.graph.erase_node(fq)
            for other in prepared.graph.nodes:
                if other is not before and other.op == "call_module" and modules.get(str(other.target)) is replaced:
                    other.target = before.target
                    if is_within(other.args[0], modules[str(before.target)], modules, but=CLAMPS):
                        silent.append(other.name)
        dropped.append(node.name)
    prepared.recompile()
    return dropped, silent


DROPOUT_MODULES = (*module_types("dropout"), DropoutLike)


def observe_each_range_once(network: GraphNetwork) -> None:
    """If several roundings share a range, observe it once per batch.

    The inputs of a concatenation are observed together and before rounding, because rounded to the range so far they
    could never widen it. For other ops, only the first rounding observes; the rest see the same values.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    sharing: dict[nn.Module, list[fx.Node]] = {}
    for node in network.graph.nodes:
        if is_fake_quantize(node, modules):
            sharing.setdefault(modules[str(node.target)], []).append(node)
    source_nodes = {
        fq: [node for node in nodes if not is_within(node.args[0], fq, modules)] for fq, nodes in sharing.items()
    }
    for fq, nodes in sharing.items():
        assert isinstance(fq, FakeQuantize)
        name, sources = str(nodes[0].target), source_nodes[fq]
        for node in nodes:
            if [node] == sources:
                continue
            if node.target == name:
                node.target = f"{name}_shared_{node.name}"
                network.add_module(str(node.target), SharedRange(fq))
            else:
                network._modules[str(node.target)] = SharedRange(fq)
        if len(sources) > 1:
            network.add_module(f"{name}_union", UnionObserver(fq))
            with network.graph.inserting_before(sources[-1]):
                network.graph.call_module(f"{name}_union", tuple(node.args[0] for node in sources))
    network.set_graph(network.graph)


def is_within(value: Any, fq: nn.Module, modules: dict[str, nn.Module], *, but: tuple[Any, ...] = ()) -> bool:
    """Whether a value consists of values rounded by ``fq``, via ops that keep the grid; dropout's scaling is ignored.

    Args:
        value: A node's argument.
        fq: The FakeQuantize.
        modules: Modules by name.
        but: Ops that keep the range but not the grid, because the limit of a clamp need not be on it.
    """
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_module" and modules.get(str(value.target)) is fq:
        return True
    face = _kind(value, modules)
    if face in but or (not shares_range(face) and face not in DROPOUT_MODULES and not is_part(face)):
        return False
    first = value.args[0] if value.args else next(iter(value.kwargs.values()))
    parts = first if isinstance(first, (list, tuple)) else [first]
    return all(is_within(part, fq, modules, but=but) for part in parts)


def is_part(face: Any) -> bool:
    """Whether a function or method returns parts of its input, or one of several parts."""
    return op_name(face) in ("getitem", "unbind", "chunk", "split", "narrow", "select", "tensor_split")


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    """The class, function or method that is called; None for an input or a tensor."""
    if node.op == "call_module":
        return type(modules[str(node.target)])
    return node.target if node.op in ("call_function", "call_method") else None


def drop_unused(network: GraphNetwork, plan: fx.Graph) -> None:
    """Drop FakeQuantizes that no node calls any more: their ranges would stay empty in every checkpoint."""
    called = {str(node.target) for graph in (network.graph, plan) for node in graph.nodes if node.op == "call_module"}
    for name, module in list(network._modules.items()):
        if isinstance(module, FakeQuantize) and name not in called:
            del network._modules[name]


def observe_everywhere(network: nn.Module) -> None:
    """Undo `observe_each_range_once`, because upstream's converter expects a FakeQuantize at every place."""
    for name, module in list(network._modules.items()):
        if isinstance(module, SharedRange):
            network._modules[name] = module.__dict__["fq"]


def is_fake_quantize(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node calls a FakeQuantize among ``modules``."""
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), FakeQuantize)


def without(graph: fx.Graph, names: list[str]) -> fx.Graph:
    """A copy of ``graph`` without some nodes, which are replaced by their inputs."""
    graph = copy.deepcopy(graph)
    drop_nodes(graph, names)
    return graph


def drop_nodes(graph: fx.Graph, names: list[str]) -> None:
    """Remove nodes from ``graph``; they are replaced by their inputs."""
    for node in list(graph.nodes):
        if node.name in names:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def hide_float_ops(graph_module: fx.GraphModule, names: list[str]) -> Callable[[fx.GraphModule], None]:
    """Hide ops that stay float from upstream's lowering, whose list of ops cannot be changed.

    Returns:
        A function that restores them in the converted graph.
    """
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    hidden: dict[str, tuple[str, Any]] = {}
    for node in graph_module.graph.nodes:
        if _kind(node, modules) in LEFT_FLOAT or node.name in names:
            hidden[node.name] = (node.op, node.target)
            node.op, node.target = "call_function", _stays_float

    def show(converted: fx.GraphModule) -> None:
        for node in converted.graph.nodes:
            if node.name in hidden:
                node.op, node.target = hidden[node.name]
                if node.op == "call_module":
                    converted.add_submodule(node.target, modules[node.target])

    return show


def _stays_float(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("stands for an op while upstream lowers the graph, and is never run")


def reshape_views(graph: fx.Graph) -> None:
    """Replace ``view``, which may not support the channels-last outputs of int8 convolutions, by ``reshape``."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"
