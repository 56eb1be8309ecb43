"""The call of a network at inference, without inputs that only its loss reads, such as labels.

Networks that compute their own loss (those of transformers, nanoGPT and others) are traced with labels, because
training gives them. At inference they are called without labels, and return less. Both calls share one graph: at
inference the nodes that read labels are left out, and the remaining outputs are returned as ``forward`` returns them.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.graph.portable_graph import HoldsGraphs
from qat_lightning.graph.signature import CallSpec

OUTPUT = "output_"
"""Prefix of the inputs of `InferenceCall.outputs`, followed by their positions."""

MakesContainer = Callable[[fx.Node], bool]
"""Whether a node creates a container of values from other nodes, such as a ``ModelOutput``."""


def makes_none(node: fx.Node) -> bool:
    """The `MakesContainer` of graphs that return flat tuples."""
    return False


@dataclass(frozen=True)
class InferenceCall(HoldsGraphs):
    """What a network returns without the inputs of its loss, in terms of what it returns with them.

    Attributes:
        without: The inputs that are left out.
        parameters: The names of the positional inputs of ``forward``, in order.
        outputs: A graph from the tensors of the whole result, in order (see `output_leaves`), to the result of the
            inference call.
        count: The number of these tensors.
        spec: The signature of the inference call, for a graph that takes and returns flat tensors; None for one that is
            called like the network.
        rest: A graph from the result of the inference call and the inputs to the whole result, which computes the loss;
            None if the loss needs other values from within the network. Its inputs are named like those of ``outputs``,
            or like inputs of the network.
    """

    without: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: fx.Graph
    count: int
    spec: CallSpec | None = None
    rest: fx.Graph | None = None

    def is_made_by(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call gives none of the inputs of the loss."""
        named = self.named(args, kwargs)
        return all(named.get(name) is None for name in self.without)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The remaining inputs of such a call, by name."""
        return {name: value for name, value in self.named(args, kwargs).items() if name not in self.without}

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All inputs of a call, by name."""
        return dict(zip(self.parameters, args, strict=False)) | kwargs

    def graph_from(self, graph: fx.Graph, makes_container: MakesContainer = makes_none) -> fx.Graph:
        """The graph of the inference call, from a form of the network's graph: prepared, int8 or loaded from a file."""
        made = copy.deepcopy(graph)
        output = made.output_node()
        leaves = list(output_leaves(output.args[0], makes_container))
        assert len(leaves) == self.count
        read = {node for node in made.nodes if node.users}
        values: dict[fx.Node, Any] = {}
        with made.inserting_before(output):
            for node in self.outputs.nodes:
                if node.op == "placeholder":
                    values[node] = leaves[place_of(node)]
                elif node.op == "output":
                    output.args = (fx.map_arg(node.args[0], values.__getitem__),)
                else:
                    values[node] = made.node_copy(node, values.__getitem__)
        for node in reversed(list(made.nodes)):
            left_out = node.op == "placeholder" and node.target in self.without
            if not node.users and (left_out or (node in read and node.op not in ("placeholder", "output"))):
                made.erase_node(node)
        made.lint()
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> InferenceCall:
        """Itself: it never changes."""
        return self


def inference_call(
    graph: fx.Graph,
    network: nn.Module,
    example: Example,
    trace: Callable[[Example], tuple[fx.Graph, CallSpec | None]],
    makes_container: MakesContainer = makes_none,
) -> InferenceCall | None:
    """Find the inputs of the loss in a traced graph, and what the network returns without them.

    Inputs of the loss are those that ``forward`` may be called without, and that no layer depends on.

    Args:
        graph: The graph of the float network, traced with ``example``.
        network: The float network.
        example: One call.
        trace: Traces a copy of the network with another call; may raise a `TraceError`.
        makes_container: Whether a node creates a container.

    Returns:
        None if there is no such input, or if the network computes something else without it or cannot be traced: then
        only the call with all inputs is supported, which a warning says, and others are refused where they are made.

    Example:
        >>> import torch
        >>> class WithLoss(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = nn.Linear(4, 2)
        ...
        ...     def forward(self, x, labels=None):
        ...         scores = self.head(x)
        ...         return scores if labels is None else (nn.functional.cross_entropy(scores, labels), scores)
        >>> def trace(example):
        ...     fixed = {} if "labels" in example.kwargs else {"labels": None}
        ...     return fx.Tracer().trace(WithLoss(), concrete_args=fixed), None
        >>> example = Example((torch.ones(2, 4),), {"labels": torch.tensor([0, 1])})
        >>> call = inference_call(trace(example)[0], WithLoss(), example, trace)
        >>> call.without, [node.name for node in call.outputs.nodes]
        (('labels',), ['output_1', 'output'])
    """
    signature = inspect.signature(network.forward)
    names = _inputs_of_loss(graph, network, example)
    if not names:
        return None
    try:
        traced = trace(_left_out(example, signature, names))
    except TraceError as error:
        _warn_that_loss_is_needed(network, names, str(error).strip().partition("\n")[0])
        return None
    parameters = [name for name, one in signature.parameters.items() if one.kind is not one.KEYWORD_ONLY]
    found = inference_call_between(graph, *traced, names, parameters, makes_container)
    if found is None:
        _warn_that_loss_is_needed(network, names, "without it, something is returned that is not returned with it")
    return found


def _warn_that_loss_is_needed(network: nn.Module, names: Sequence[str], why: str) -> None:
    left = " and ".join(names)
    warnings.warn(
        f"Once it is quantized, {type(network).__name__} can only be called with {left}, which only its loss reads: "
        f"{why}. To call or export it without, return the same outputs beside the loss, or use mode='eager'.",
        stacklevel=2,
    )


def inference_call_between(
    graph: fx.Graph,
    lean: fx.Graph,
    spec: CallSpec | None,
    without: Sequence[str],
    parameters: Sequence[str],
    makes_container: MakesContainer = makes_none,
) -> InferenceCall | None:
    """The inference call of a graph, from its graph of another trace.

    Args:
        graph: The graph of the whole call.
        lean: The graph of the inference call.
        spec: Its signature, for graphs that take and return flat tensors.
        without: The inputs that it leaves out.
        parameters: The names of the positional inputs of ``forward``, in order.
        makes_container: Whether a node creates a container.

    Returns:
        None if the inference call returns something that the whole call does not.
    """
    outputs = _outputs(graph, lean, makes_container)
    if outputs is None:
        return None
    leaves = list(output_leaves(graph.output_node().args[0], makes_container))
    given = {leaves[place_of(node)]: str(node.target) for node in outputs.find_nodes(op="placeholder")}
    rest = _Rest(graph, given, without)
    whole = rest.copied(graph.output_node())
    return InferenceCall(
        tuple(without), tuple(parameters), outputs, len(leaves), spec, None if whole is None else rest.graph
    )


def inference_example(call: InferenceCall, example: Example) -> Example:
    """The call of an example without the inputs of the loss."""
    return Example((), call.arguments(example.args, example.kwargs))


def place_of(placeholder: fx.Node) -> int:
    """Which tensor of the whole result an input of `InferenceCall.outputs` is; -1 if its name does not say."""
    number = str(placeholder.target).removeprefix(OUTPUT)
    return int(number) if number.isdecimal() else -1


def output_leaves(result: Any, makes_container: MakesContainer) -> Iterator[fx.Node]:
    """The nodes in what a graph returns, in order, through containers that it creates."""
    found: list[fx.Node] = []
    fx.map_arg(result, found.append)
    for node in found:
        if makes_container(node):
            yield from output_leaves((node.args, node.kwargs), makes_container)
        else:
            yield node


def optional_inputs(network: nn.Module, example: Example) -> list[str]:
    """The inputs that a call gives, and whose default is None.

    Example:
        >>> optional_inputs(nn.MultiheadAttention(4, 1), Example((1, 2, 3), {"need_weights": False, "attn_mask": 4}))
        ['attn_mask']
    """
    signature = inspect.signature(network.forward)
    parameters = signature.parameters
    if any(one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL) for one in parameters.values()):
        return []
    given = signature.bind(*example.args, **example.kwargs).arguments
    return [name for name, value in given.items() if value is not None and parameters[name].default is None]


def _inputs_of_loss(graph: fx.Graph, network: nn.Module, example: Example) -> list[str]:
    optional = optional_inputs(network, example)
    if not optional:
        return []
    nodes = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    layers = {
        name for name, module in network.named_modules(remove_duplicate=False) if any(True for _ in module.parameters())
    }

    def is_layer(node: fx.Node) -> bool:
        """Whether a node calls a module with parameters, or reads one; a module that the trace created has none."""
        if node.op == "call_module" and str(node.target) in layers:
            return True
        return any(source.op == "get_attr" and str(source.target) in parameters for source in node.all_input_nodes)

    return [name for name in optional if name in nodes and not any(map(is_layer, _behind(nodes[name])))]


def _behind(source: fx.Node) -> Iterator[fx.Node]:
    """The nodes that depend on a node."""
    reached, waiting = {source}, [source]
    while waiting:
        for user in waiting.pop().users.keys() - reached:
            yield user
            reached.add(user)
            waiting.append(user)


def _left_out(example: Example, signature: inspect.Signature, names: Sequence[str]) -> Example:
    bound = signature.bind(*example.args, **example.kwargs)
    for name in names:
        del bound.arguments[name]
    return Example(bound.args, bound.kwargs)


class _Rest:
    """Copies the nodes of a graph that compute the loss.

    Args:
        source: The graph.
        known: Nodes whose values are given, with names for them.
        without: The inputs of the loss.
    """

    def __init__(self, source: fx.Graph, known: dict[fx.Node, str], without: Sequence[str]) -> None:
        self.graph, self.known = fx.Graph(), known
        self.of_loss = {node for node in source.find_nodes(op="placeholder") if node.target in without}
        for node in source.nodes:
            if self.of_loss & set(node.all_input_nodes):
                self.of_loss.add(node)
        self.made: dict[fx.Node, fx.Node] = {}

    def copied(self, node: fx.Node) -> fx.Node | None:
        """The copy of a node; None if it needs more than what is given, such as a layer."""
        if node in self.made:
            return self.made[node]
        if node in self.known or node.op == "placeholder":
            self.made[node] = self._given(self.known.get(node, str(node.target)))
            return self.made[node]
        computes = node.op in ("call_function", "call_method")
        sources = node.all_input_nodes
        if node not in self.of_loss and not (computes and all(source.op != "get_attr" for source in sources)):
            return None
        made = {source: self._read(source, node) for source in sources}
        if None in made.values():
            return None
        self.made[node] = self.graph.node_copy(node, made.__getitem__)
        return self.made[node]

    def _read(self, source: fx.Node, reader: fx.Node) -> fx.Node | None:
        if source.op == "get_attr" and reader in self.of_loss:  # such as weights of classes
            return self.made.setdefault(source, self.graph.node_copy(source))
        return self.copied(source)

    def _given(self, name: str) -> fx.Node:
        with self.graph.inserting_before():
            return self.graph.placeholder(name)


class _Values:
    """Numbers for the values of nodes, equal for nodes of several graphs that compute the same."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._of: dict[fx.Node, int] = {}

    def read(self, graph: fx.Graph) -> None:
        """Number the values of a graph."""
        for node in graph.nodes:
            if _passes_on(node):
                self._of[node] = self._of[node.all_input_nodes[0]]
            elif node.op != "output":
                arguments = repr(fx.map_arg((node.args, node.kwargs), lambda inner: _Number(self._of[inner])))
                key = node.op, node.target, arguments if node.op != "placeholder" else ""
                self._of[node] = self._numbers.setdefault(key, len(self._numbers))

    def __getitem__(self, node: fx.Node) -> int:
        return self._of[node]


def _passes_on(node: fx.Node) -> bool:
    """Whether a node casts a tensor to the dtype that it has, which export may take for the tensor or leave out."""
    if getattr(node.target, "overloadpacket", None) is not torch.ops.aten.to:
        return False
    before, after = (each.meta.get("val") for each in (node.all_input_nodes[0], node))
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype is after.dtype


class _Number(int):
    def __repr__(self) -> str:
        return f"%{int(self)}"


def _outputs(full: fx.Graph, lean: fx.Graph, makes_container: MakesContainer) -> fx.Graph | None:
    """The graph from the tensors that one graph returns to what another one returns; None if there is none."""
    values = _Values()
    values.read(full)
    values.read(lean)
    leaves = list(output_leaves(full.output_node().args[0], makes_container))
    places = {values[leaf]: place for place, leaf in reversed(list(enumerate(leaves)))}
    wanted = {values[leaf] for leaf in output_leaves(lean.output_node().args[0], makes_container)}
    if not wanted or not wanted <= places.keys():
        return None
    outputs = fx.Graph()
    in_order = sorted(wanted, key=lambda number: places[number])
    made = {number: outputs.placeholder(f"{OUTPUT}{places[number]}") for number in in_order}

    def returned(value: Any) -> Any:
        return fx.map_arg(value, made_from)

    def made_from(node: fx.Node) -> fx.Node:
        if not makes_container(node):
            return made[values[node]]
        return outputs.create_node(node.op, node.target, returned(node.args), returned(node.kwargs), name=node.name)

    outputs.output(returned(lean.output_node().args[0]))
    return outputs
