"""Support for inputs of other sizes than a network was traced for: a second trace that shares everything learned.

The prepared network runs the new graph on its own layers and ranges. The int8 network is converted again, until it is
saved. Both happen once per new size.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from qat_lightning.errors import NetworkError, TraceError, first_line
from qat_lightning.graph.example import Example, part_that_runs, whole_call
from qat_lightning.graph.scopes import unused_path
from qat_lightning.graph.signature import batch_size, has_batch
from qat_lightning.layers.mode_layers import ByMode
from qat_lightning.layers.relu_rounding import with_relus_in_roundings
from qat_lightning.modes.fx.shapes import CONSTANT
from qat_lightning.modes.graph_network import GraphNetwork, compile_graph
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import cpu_copy, prepared_state
from qat_lightning.modes.shared_range import UnionObserver
from qat_lightning.numerics.fake_quantize import FakeQuantize

_SAMPLES = 4


class SharedLayers:
    """Traces a prepared network for other sizes, with its own layers and ranges."""

    def __call__(self, network: GraphNetwork, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """The function that runs ``network`` on inputs like these; its first argument is the network.

        Raises:
            NetworkError: It cannot be traced for them, or takes another path through forward.
        """
        with aside():
            other = _prepare_again(network, args, kwargs)
            parting = _parting(network, other)
            if parting is not None:
                raise _other_way(network, args, kwargs, parting)
            graph = _own_constants(network, other)
        return compile_graph(with_relus_in_roundings(network, graph))


class ConvertsAgain:
    """Converts a prepared network again for other input sizes.

    Args:
        prepared: A copy of the prepared network, on the CPU, made before its conversion.
    """

    def __init__(self, prepared: GraphNetwork) -> None:
        self.prepared = prepared

    def __call__(self, network: GraphNetwork, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """The function that runs the int8 network on inputs like these; its first argument is the network.

        Raises:
            NetworkError: It cannot be converted for them.
        """
        with aside():
            other = _prepare_again(self.prepared, args, kwargs)
            example = example_like(self.prepared, prepared_state(self.prepared).float_network, args, kwargs)
            if (parting := _parting(self.prepared, other)) is not None:
                raise _other_way(network, args, kwargs, parting)
            other.load_state_dict(self.prepared.state_dict())
            leave_float(other, prepared_state(self.prepared).left_float, example)
            converted = prepared_state(other).mode.convert(cpu_copy(other), example).network
            assert isinstance(converted, GraphNetwork)
            converted.give_sizes(converted.sizes, self)  # in place of a float copy of its own
        return lambda network, *args, **kwargs: converted(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvertsAgain:
        """Itself, because it does not change."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """None: a file does not store the network that trains."""
        return type(None), ()


def _prepare_again(network: GraphNetwork, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphNetwork:
    state = prepared_state(network)
    original = copy.deepcopy(state.float_network).cpu().float()
    try:
        other = state.mode.prepare(
            original, example_like(network, original, args, kwargs), state.recipe, prefix=state.prefix
        )
    except Exception as error:  # a network may raise anything for other sizes
        assert network.sizes is not None
        raise NetworkError(
            f"{network.sizes.refusal(network.sizes.others(args, kwargs))} ({first_line(error)})"
        ) from error
    assert isinstance(other, GraphNetwork)
    return other


def example_like(network: GraphNetwork, original: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """A call as an example: on the CPU, with a few samples, but at least two if their number is not fixed.

    Args:
        network: The network that is called.
        original: Its float network.
        args: Positional inputs.
        kwargs: Keyword inputs.
    """
    call = whole_call(Example(args, kwargs))
    size = batch_size(call)
    few = Example(*pytree.tree_map(functools.partial(_few, size=size), (call.args, call.kwargs)))
    assert network.sizes is not None
    if network.sizes.key(few.args, few.kwargs) != network.sizes.key(args, kwargs):
        return call
    return part_that_runs(original, few, call)


def _few(leaf: Any, size: int | None) -> Any:
    if not has_batch(leaf, size):
        return leaf
    return torch.cat([leaf, leaf]) if size == 1 else leaf[:_SAMPLES]


def _parting(network: GraphNetwork, other: GraphNetwork) -> str | None:
    """The name of the node near which two traces begin to differ in more than constants; None if there is none."""
    ways = [list(each.graph.nodes) for each in (network, other)]
    places = [{node: number for number, node in enumerate(way)} for way in ways]

    def wiring(node: fx.Node, place: dict[fx.Node, int]) -> Any:
        return node.op, node.target, [place[source] for source in node.all_input_nodes]

    for one, two in zip(*ways, strict=False):
        if wiring(one, places[0]) != wiring(two, places[1]) or not _same_kind(one, network, other):
            return _of_forward(two, other)
    if len(ways[0]) == len(ways[1]):
        return None
    longer, way = max(zip((network, other), ways, strict=True), key=lambda pair: len(pair[1]))
    return _of_forward(way[min(map(len, ways))], longer)


def _of_forward(node: fx.Node, network: nn.Module) -> str:
    """The name of a node that is not one of quantization: what an observer reads."""
    while node.op == "call_module" and isinstance(
        network.get_submodule(str(node.target)), (FakeQuantize, UnionObserver)
    ):
        node = node.all_input_nodes[0]
    return str(node.name)


def _same_kind(node: fx.Node, *networks: nn.Module) -> bool:
    kinds = {type(network.get_submodule(str(node.target))) for network in networks if node.op == "call_module"}
    return len(kinds) < 2


def _own_constants(network: GraphNetwork, other: GraphNetwork) -> fx.Graph:
    """The graph of another trace, for ``network``.

    Its constants are stored in ``network`` under unused names. What depends on a training flag follows that of the
    network's own module, which has the place and so the flag of the part that calls it.
    """
    graph: fx.Graph = copy.deepcopy(other.graph)
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    names: dict[str, str] = {}
    for node in list(graph.nodes):
        target = str(node.target)
        if node.op == "get_attr" and target.startswith(CONSTANT):
            name = names.setdefault(target, unused_path(network, f"{target}_size"))
            network.register_buffer(name, getattr(other, target).to(device), persistent=False)
            node.target = name
        elif node.op == "call_module" and isinstance(module := other.get_submodule(target), ByMode):
            with graph.inserting_before(node):
                own = graph.create_node("get_attr", target)
                called = graph.call_function(_with_flag_of(module), (own, *node.args))
            node.replace_all_uses_with(called)
            graph.erase_node(node)
    return graph


def _with_flag_of(other: ByMode) -> Callable[..., Any]:
    """A function that calls ``other`` in the mode of the module that is its first argument."""

    def by_mode(own: nn.Module, *tensors: Any) -> Any:
        return other.as_in(tensors, training=own.training)

    return by_mode


def _other_way(network: GraphNetwork, args: tuple[Any, ...], kwargs: dict[str, Any], node: str) -> TraceError:
    assert network.sizes is not None
    return TraceError(
        f"{network.sizes.refusal(network.sizes.others(args, kwargs))} Layers and ranges can only be shared between "
        f"sizes that take the same path through forward, and these diverge near {node!r}."
    )


@contextmanager
def aside() -> Iterator[None]:
    """Within the block, use the gradient, inference and autocast modes of preparation; restores random states."""
    state = random.getstate()
    try:
        with (
            torch.random.fork_rng(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        random.setstate(state)
