"""Running graphs to compare their values: recording each node's value, and running again with disturbances."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from qat_lightning.graph.buffers import buffers_copied
from qat_lightning.graph.example import Example
from qat_lightning.graph.generators import generators_kept
from qat_lightning.layers.relu_rounding import writes_in_place
from qat_lightning.modes.judging import MARGIN_DB, decibels
from qat_lightning.modes.whole import ENOUGH_DB, Disturbance


class RunsApart(fx.Interpreter):
    """Runs a graph on copies of its module's buffers: each run begins with the same ones, and changes none.

    The same holds for random generators that are attributes: each run draws the same numbers from them.
    """

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph."""
        with generators_kept(self.module, seed=0), buffers_copied(self.module):
            return super().run(*args, **kwargs)


class Recorder(RunsApart):
    """Runs a graph with any module and records the value of each node, as it was before an in-place op changed it."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and record its value."""
        if writes_in_place(n, self.fetch_attr(str(n.target)) if n.op == "call_module" else None):
            self._keep(n.all_input_nodes[0])
        value = super().run_node(n)
        self.values[n.name] = value
        return value

    def _keep(self, written: fx.Node) -> None:
        """Copy recorded values that share memory with one that is about to be changed."""
        changed = self.env[written]
        if not isinstance(changed, Tensor):
            return
        memory = changed.untyped_storage().data_ptr()
        for name, value in self.values.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory:
                self.values[name] = value.clone()


@contextmanager
def same_random_numbers(what: str = "", state: Tensor | None = None) -> Iterator[None]:
    """Make random ops reproducible within the block, and restore the state of the generator.

    Args:
        what: The node or network that draws random numbers; it determines the seed.
        state: The state of the generator with which to begin instead.
    """
    with torch.random.fork_rng(devices=[]):
        if state is None:
            torch.default_generator.manual_seed(zlib.crc32(what.encode()))
        else:
            torch.default_generator.set_state(state)
        yield


class SeededRecorder(Recorder):
    """Records, and seeds each node separately, so that nodes draw the same random numbers in every graph.

    Args:
        module: Holds the modules that the graph calls.
        graph: The graph to run.
        origins: The names of nodes in the graph that this one was made from, where they differ.
        drawing: The original names of nodes that draw random numbers.

    Attributes:
        drawn: The original names of the nodes that drew random numbers in this run.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        origins: Mapping[str, str] | None = None,
        drawing: Collection[str] = (),
    ) -> None:
        super().__init__(module, graph)
        self.origins, self.drawing = origins or {}, drawing
        self.drawn: set[str] = set()
        self._in_order = False

    def run_node(self, n: fx.Node) -> Any:
        """Run one node with its own seed."""
        name = self.origins.get(n.name, n.name)
        self._in_order = name in self.drawing
        before = seed(name)
        value = super().run_node(n)
        if not torch.equal(before, torch.get_rng_state()):
            self.drawn.add(name)
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """The arguments of a node; contiguous for one that draws random numbers, so that draws are comparable."""
        found = super().fetch_args_kwargs_from_env(n)
        return in_order(found) if self._in_order else found


def in_order(values: Any) -> Any:
    """The same tensors in contiguous format: random numbers are drawn in memory order."""
    return tree_map(lambda v: v.contiguous() if isinstance(v, Tensor) and not v.is_quantized else v, values)


def seed(name: str) -> Tensor:
    """Seed the random numbers of a node, and return the generator's initial state."""
    # Not torch.manual_seed, which records a traceback for each accelerator; everything runs on the CPU here.
    torch.default_generator.manual_seed(zlib.crc32(name.encode()))
    return torch.get_rng_state()


class Again:
    """Runs fake-quant again, with small disturbances.

    Args:
        prepared: The prepared network.
        graph: Its graph.
        inputs: The values of its placeholders.
        rounds: Whether a node rounds activations.
        errors: By how much the kernel of a node differed; each such rounding is correct.
        drawing: The nodes that draw random numbers.

    Attributes:
        draws: The values of each run.
    """

    def __init__(
        self,
        prepared: nn.Module,
        graph: fx.Graph,
        inputs: list[Any],
        rounds: Callable[[fx.Node], bool],
        errors: Mapping[str, Tensor],
        drawing: Collection[str] = (),
    ) -> None:
        self.prepared, self.graph, self.inputs = prepared, graph, inputs
        self.rounds, self.errors, self.drawing = rounds, errors, drawing
        self.draws: list[dict[str, Any]] = []

    def disturbed(self, disturb: Disturbance) -> Any:
        """Disturb the inputs, and the tensors that are rounded, by a millionth."""

        def change(node: fx.Node, value: Any) -> Any:
            near = node.op == "placeholder" or any(self.rounds(user) for user in node.users)
            return disturb(value) if near else value

        return self._run(change)

    def replayed(self, disturb: Disturbance) -> Any:
        """Disturb the inputs by a millionth, and use the roundings of the kernels."""

        def change(node: fx.Node, value: Any) -> Any:
            value = disturb(value) if node.op == "placeholder" else value
            return value + self.errors[node.name] if node.name in self.errors else value

        return self._run(change)

    @property
    def ways(self) -> tuple[Callable[[Disturbance], Any], ...]:
        """The argument ``ways`` of `check_whole`."""
        return (self.disturbed, self.replayed) if self.errors else (self.disturbed,)

    def _run(self, change: Callable[[fx.Node, Any], Any]) -> Any:
        run = _Changed(self.prepared, self.graph, change, self.drawing)
        result = run.run(*copies(self.inputs))
        self.draws.append(run.values)
        return result

    def is_unlike(self, wanted: Tensor, got: Tensor, source: str) -> bool:
        """Whether a value is farther from fake-quant's than the disturbed runs are."""
        ratio = decibels(wanted, got)
        least = min((decibels(wanted, draw[source]) for draw in self.draws if source in draw), default=ENOUGH_DB)
        return ratio < ENOUGH_DB and ratio < least - MARGIN_DB


class _Changed(SeededRecorder):
    """Runs a graph and changes values on the way."""

    def __init__(
        self, module: nn.Module, graph: fx.Graph, change: Callable[[fx.Node, Any], Any], drawing: Collection[str]
    ) -> None:
        super().__init__(module, graph, None, drawing)
        self.change = change

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = value = self.change(n, super().run_node(n))
        return value


def feeding(node: fx.Node, layer_of: Callable[[fx.Node], str]) -> list[str]:
    """The nearest layers that feed an op.

    Args:
        node: The op.
        layer_of: Returns the name of the layer that a node calls; empty if it is not a layer.
    """
    found: dict[str, None] = {}
    seen, waiting = set[fx.Node](), list(node.all_input_nodes)
    while waiting:
        source = waiting.pop(0)
        if source in seen:
            continue
        seen.add(source)
        if name := layer_of(source):
            found[name] = None
        else:
            waiting += source.all_input_nodes
    return list(found)


def example_values(graph: fx.Graph, example: Example) -> list[Any]:
    """The example's inputs in the order of a graph's placeholders."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    values = list(example.args)
    for node in inputs[len(values) :]:
        if str(node.target).startswith("*"):
            continue  # *args and **kwargs are empty here
        # A parameter that the example omits has its default, which is the placeholder's argument.
        values.append(example.kwargs[node.target] if node.target in example.kwargs else node.args[0])
    return values


@torch.no_grad()
def run_of(network: nn.Module, graph: fx.Graph, inputs: Sequence[Any]) -> dict[str, Any]:
    """The value of each node of a network's graph; the inputs are not changed."""
    recorder = Recorder(network, graph)
    recorder.run(*copies(list(inputs)))
    return recorder.values


def copy_of(value: Any) -> Any:
    """A copy of a tensor that may be overwritten."""
    return value.clone() if isinstance(value, Tensor) else value


def copies(values: Any) -> Any:
    """Copies of inputs that a forward may change in place."""
    return tree_map(copy_of, values)
