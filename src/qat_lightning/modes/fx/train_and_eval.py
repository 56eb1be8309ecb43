"""One graph for training and evaluation of a network, which may differ in dropout only."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join, unused_path
from qat_lightning.graph.training_flags import evaluating
from qat_lightning.layers.mode_layers import GIVEN, ByMode, DropoutLike
from qat_lightning.layers.operators import rows
from qat_lightning.modes.fx.tracer import Traced, holds_no_layer
from qat_lightning.modes.graph_network import GraphNetwork
from qat_lightning.modes.recording import RunsApart, example_values

DROPOUTS: dict[Any, type[nn.Module]] = {
    function: row.modules[0] for row in rows("dropout") for function in row.functions
}


BY_MODE = "_by_mode"
"""Prefix of the names of modules that replace functions which depend on the training flag."""


_KEPT = (F.batch_norm, torch._assert)
"""Functions that `flags_by_mode` does not change."""


def parting(training: Traced, evaluation: Traced) -> tuple[fx.Node | None, fx.Node | None] | None:
    """The first nodes where two traces of a network differ; None if they do not differ."""
    ways = [list(way.graph_module.graph.nodes) for way in (training, evaluation)]
    positions = [{node: number for number, node in enumerate(way)} for way in ways]

    def wiring(node: fx.Node, position: dict[fx.Node, int]) -> Any:
        return [position[source] for source in node.all_input_nodes]

    for number in range(max(map(len, ways))):
        one, other = (way[number] if number < len(way) else None for way in ways)
        if one is None or other is None or (one.op, str(one.target)) != (other.op, str(other.target)):
            return one, other
        if wiring(one, positions[0]) != wiring(other, positions[1]):
            return one, other
    return None


def owner_of_parting(
    network: nn.Module, parts: tuple[fx.Node | None, fx.Node | None], training: Traced, evaluation: Traced
) -> str | None:
    """The path of a module without layers that behaves differently in evaluation, if two traces diverge there."""
    for node, way in zip(parts, (training, evaluation), strict=True):
        path = way.scopes[node.name][0] if node is not None and node.name in way.scopes else ""
        if path and not path.startswith("torch.") and holds_no_layer(network.get_submodule(path)):
            return str(path)
    return None


def flags_by_mode(training: Traced, evaluation: Traced) -> None:
    """Let functions whose arguments differ in evaluation, such as ``training=self.training``, follow a flag.

    ``F.batch_norm``, which has tensors along with its flag, is not changed, nor is an assertion, whose message may name
    values as one of the traces does. Nodes of the two graphs still correspond.
    """
    traced = training
    norms = _norms(traced.graph_module.graph)
    pairs = zip(traced.graph_module.graph.nodes, evaluation.graph_module.graph.nodes, strict=True)
    for node, other in list(pairs):
        if node.op not in ("call_function", "call_method") or node.target in _KEPT:
            continue
        ways = [_with_places((each.args, each.kwargs)) for each in (node, other)]
        if _same(*ways):
            continue
        dropout = _dropout(node, other)
        # In the module that calls it, which may be kept in evaluation while the network trains.
        scope, _ = traced.scopes.get(node.name, ("", None))
        # A BatchNorm becomes a layer in which nothing else is called.
        scope = next((norm.rpartition(".")[0] for norm in norms if f"{scope}.".startswith(f"{norm}.")), scope)
        path = unused_path(traced.graph_module, join(scope, BY_MODE if dropout is None else "_functional_dropout"))
        traced.graph_module.add_submodule(path, dropout or ByMode(node.target, *ways))
        replace_node(traced, node, path, tuple(_nodes((node.args, node.kwargs))))


def _norms(graph: fx.Graph) -> list[str]:
    """The paths of modules whose tensors ``F.batch_norm`` reads."""
    read = [
        source for node in graph.find_nodes(op="call_function", target=F.batch_norm) for source in node.all_input_nodes
    ]
    owners = (str(source.target).rpartition(".")[0] for source in read if source.op == "get_attr")
    return sorted({owner for owner in owners if owner})


def call_as_in_evaluation(network: GraphNetwork) -> None:
    """In a network that never trains again, call functions with a flag as in evaluation."""
    for node in network.graph.find_nodes(op="call_module"):
        module = network.get_submodule(str(node.target))
        if isinstance(module, ByMode):
            args, kwargs = module.arguments(node.args, training=False)
            op = "call_method" if isinstance(module.function, str) else "call_function"
            with network.graph.inserting_before(node):
                made = network.graph.create_node(op, module.function, args, kwargs, name=node.name)
            node.replace_all_uses_with(made)
            network.graph.erase_node(node)
            parent, _, name = str(node.target).rpartition(".")
            network.get_submodule(parent)._modules.pop(name, None)
    network.set_graph(network.graph)


def _dropout(node: fx.Node, other: fx.Node) -> nn.Module | None:
    """The layer that corresponds to a dropout function; None for other functions, or if more than a flag differs."""
    function: Any = node.target
    if function not in DROPOUTS:
        return None
    ways = []
    for each in (node, other):
        bound = inspect.signature(function).bind(*each.args, **each.kwargs)
        bound.apply_defaults()
        ways.append(bound.arguments)
    fits = ways[0]["training"] is True and ways[1]["training"] is False and isinstance(ways[0]["p"], (int, float))
    return DROPOUTS[function](p=ways[0]["p"]) if fits else None


@torch.no_grad()
def mark_dropouts(
    traced: Traced, network: nn.Module, example: Example, paths: list[str], *, by_example: bool = False
) -> None:
    """Wrap each module that always returns its input in evaluation in `DropoutLike`.

    Args:
        traced: The graph; modules of ``paths`` may be replaced.
        network: The float network.
        example: One call.
        paths: Modules without layers; one that holds tensors stays where these have their names.
        by_example: Whether to decide by the example alone.
    """
    root = traced.graph_module
    if not paths:
        return
    with evaluating(network, root), torch.random.fork_rng(devices=[]):
        run = _Compared(root, by_example=by_example)
        run.run(*copy.deepcopy(example_values(root.graph, example)))
    for path in paths:
        inner = root.get_submodule(path)
        held = any(True for _ in inner.parameters()) or any(True for _ in inner.buffers())
        if path in run.same and path not in run.other and not held:
            set_module(root, path, DropoutLike(inner).train(inner.training))


class _Compared(RunsApart):
    """Runs a graph, and records which modules return their single input tensor."""

    def __init__(self, root: fx.GraphModule, *, by_example: bool) -> None:
        super().__init__(root, garbage_collect_values=False)
        self.by_example = by_example

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.same: set[str] = set()
        self.other: set[str] = set()
        return super().run(*args, **kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0].clone() if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
        result = super().call_module(target, args, kwargs)
        same = given is not None and isinstance(result, Tensor) and torch.equal(result, given)
        if same and (self.by_example or _is_identity(self.fetch_attr(target), given)):
            self.same.add(str(target))
        else:
            self.other.add(str(target))
        return result


def _is_identity(module: nn.Module, given: Any) -> bool:
    """Whether a module returns its input tensor, whatever its values and sizes are.

    A copy is called, because it may store its input, with a tensor without values and with sizes that record whether a
    decision depends on them.
    """
    sizes = ShapeEnv()
    any_sizes: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * given.dim())
    try:
        asked = copy.deepcopy(module)
        for part in asked.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        with FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True) as mode:
            empty = mode.from_tensor(given, symbolic_context=any_sizes)
            return asked(empty) is empty and not sizes.guards
    except Exception:  # noqa: BLE001 - it looks at values, or does what a tensor without values cannot
        return False


def replace_node(traced: Traced, node: fx.Node, path: str, args: tuple[Any, ...]) -> fx.Node:
    """Replace ``node`` by a call of the module ``path``."""
    graph = traced.graph_module.graph
    with graph.inserting_after(node):
        made = graph.call_module(path, args)
    made.meta.update(node.meta)
    if node.name in traced.scopes:
        traced.scopes[made.name] = traced.scopes[node.name]
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path."""
    parent, _, leaf = path.rpartition(".")
    root.get_submodule(parent)._modules[leaf] = module


def _with_places(arguments: Any) -> Any:
    def place(leaf: Any) -> Any:
        return GIVEN if isinstance(leaf, fx.Node) else leaf

    return fx.node.map_aggregate(arguments, place)


def _nodes(arguments: Any) -> list[fx.Node]:
    return [leaf for leaf in _leaves(arguments) if isinstance(leaf, fx.Node)]


def _leaves(arguments: Any) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate(arguments, found.append)
    return found


def _same(one: Any, other: Any) -> bool:
    left, right = _leaves(one), _leaves(other)
    return len(left) == len(right) and all(
        a is b or (type(a) is type(b) and a == b) for a, b in zip(left, right, strict=True)
    )
