"""Recording the outputs of named modules: by hooks where modules are called, and from the graph in graph modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.scopes import scope_of
from qat_lightning.modes.graph_network import GraphNetwork, compile_graph
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.numerics.fake_quantize import FakeQuantize


class _AllSeen(Exception):
    """Ends a call early, when its output is not needed; not an error."""


class Features:
    """Records the output tensors of named modules of a network, in training and with gradients.

    In a graph there are no module calls to hook: while `open`, the network runs a copy of its graph that also returns
    these tensors. The network's own graph, and so its copies and its conversion, are not affected.

    Args:
        network: A float network, or a prepared one of any mode.
        names: Modules of the float network. If a module is called several times, the last call counts; if it returns a
            tuple, as transformer blocks may, the first element.

    Attributes:
        seen: The tensor of each name, from the last call. For a prepared network it is rounded, if the network rounds
            it.
        calls: Number of calls of each since the last `forget`; empty for a graph, which calls no modules.
        without_gradient: Names of modules that were called without gradients.

    Raises:
        ConfigurationError: There is no such module, or it is merged with others in the graph.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> features = Features(network, ["0"])
        >>> with features.open():
        ...     _ = network(torch.zeros(1, 2))
        >>> features.seen["0"].shape
        torch.Size([1, 3])
        >>> features.close()
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.seen: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self.without_gradient: set[str] = set()
        self._open = False
        self._until: Mapping[str, int] = {}
        self._network = network
        self._handles: list[RemovableHandle] = []
        self._run: Callable[..., Any] | None = None
        if names and isinstance(network, GraphNetwork):
            self._run = _run_with_features(network, list(names), self.seen)
        else:
            modules = dict(network.named_modules(remove_duplicate=False))
            for name in names:
                if name not in modules:
                    raise ConfigurationError(f"There is no module {name!r} to take a feature from.")
                self._handles.append(modules[name].register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if not self._open:
                return  # as in the recomputation of a checkpoint, in the backward pass
            self.seen[name] = output[0] if isinstance(output, tuple) and output else output
            self.calls[name] += 1
            if not torch.is_grad_enabled():
                self.without_gradient.add(name)
            if self._until and all(self.calls[known] >= count for known, count in self._until.items()):
                raise _AllSeen

        return keep

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within the block, calls of the network fill `seen`."""
        plain = self._network.__dict__.get("_run")
        if self._run is not None:
            self._network.__dict__["_run"] = self._run
        self._open = True
        try:
            yield
        finally:
            self._open = False
            if self._run is not None:
                self._network.__dict__["_run"] = plain

    def see(self, calls: Mapping[str, int], *args: Any, **kwargs: Any) -> None:
        """Call the network only for its features, and stop after the last of them.

        Args:
            calls: Number of calls of each module that will follow; empty if unknown.
            args: Positional inputs of the network.
            kwargs: Keyword inputs of the network.
        """
        self.forget()
        # Compiled code cannot stop early.
        self._until = {} if torch.compiler.is_compiling() else calls
        try:
            with self.open():
                self._network(*args, **kwargs)
        except _AllSeen:
            pass
        finally:
            self._until = {}

    def forget(self) -> None:
        """Discard the tensors of earlier calls."""
        self.seen.clear()
        self.calls.clear()
        self.without_gradient.clear()

    def close(self) -> None:
        """Remove all hooks and tensors."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()


def _run_with_features(network: GraphNetwork, names: list[str], seen: dict[str, Tensor]) -> Callable[..., Any]:
    nodes = [_output_of(network, name) for name in names]
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    output = graph.graph_copy(network.graph, copies)
    graph.output((output, tuple(copies[node] for node in nodes)))
    run, spec = compile_graph(graph), network.__dict__.get("spec")

    def call(holder: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if spec is None:
            outputs, features = run(holder, *args, **kwargs)
        else:
            outputs, features = run(holder, *spec.flatten(args, kwargs))
            outputs = spec.unflatten(outputs)
        seen.update(zip(names, features, strict=True))
        return outputs

    return call


def separate(network: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Return the modules of the float network whose output is a tensor of its own in a prepared network.

    Args:
        network: A prepared network.
        names: The modules in question; None for all.

    Example:
        >>> from qat_lightning import Recipe, prepare
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        >>> separate(prepare(network, torch.zeros(2, 1, 8, 8), Recipe("fx", "x86")))
        ['0', '3']
    """
    known = dict(prepared_state(network).float_network.named_modules(remove_duplicate=False))
    asked = [name for name in known if name and (names is None or name in names)]
    if isinstance(network, GraphNetwork):
        return [name for name in asked if _leaving(network, name)]
    there = dict(network.named_modules(remove_duplicate=False))
    return [name for name in asked if name in there]


def _output_of(network: GraphNetwork, name: str) -> fx.Node:
    """The node with the output of the module ``name``, after its rounding if there is one."""
    leaving = _leaving(network, name)
    if not leaving:
        raise ConfigurationError(f"The module {name!r} has no separate tensor in the graph to take a feature from.")
    modules = dict(network.named_modules(remove_duplicate=False))

    def is_rounding(node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(modules.get(str(node.target)), FakeQuantize)

    last = leaving[-1]
    return next((user for user in last.users if is_rounding(user)), last)


def _leaving(network: GraphNetwork, name: str) -> list[fx.Node]:
    """The nodes of the module ``name`` that are used outside of it."""
    inside = {node for node in network.graph.nodes if node.op.startswith("call_") and _within(scope_of(node), name)}
    return [node for node in network.graph.nodes if node in inside and not set(node.users) <= inside]


def _within(scope: str, name: str) -> bool:
    return scope == name or scope.startswith(f"{name}.")
