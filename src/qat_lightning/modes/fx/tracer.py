"""A tracer that records the network's tensors as they are, and calls weightless modules as a whole if necessary.

Parameters and buffers know their shape, which a forward may query; device and dtype are queried whenever the graph
runs. A module without layers that cannot be traced, or draws random numbers, is called as a whole.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as torchs_tracing
from torch.fx.proxy import Proxy
from torch.fx.proxy import TraceError as FxTraceError

from qat_lightning.graph.buffers import write_back
from qat_lightning.graph.generators import generators_kept, generators_of, random_state, states_of
from qat_lightning.layers.operators import WEIGHTED
from qat_lightning.modes.fx.known import TensorProxy
from qat_lightning.modes.fx.layer_settings import LayerSettings, TracedValue
from qat_lightning.modes.fx.patches import answering_kinds
from qat_lightning.modes.own_gradients import STOPPED, OwnGradient
from qat_lightning.modes.plain_attributes import is_own
from qat_lightning.modes.structured_tracer import StructuredTracer
from qat_lightning.numerics.recomputation import Checkpointed

_COUNTER = "num_batches_tracked"

CONSTANTS = ("_example_constant", "_tensor_constant")
"""Prefix of the names under which a trace stores tensors that a forward creates without its inputs."""


class CallAsWhole(Exception):
    """Aborts a trace at a module that has to be called as a whole."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class DecidesByChance(Exception):
    """Aborts a trace at a module that contains layers and draws random numbers while it is traced."""


@dataclass
class Traced:
    """One trace of a network.

    Attributes:
        graph_module: The graph; its layers are the network's own.
        scopes: For the name of each node, path and class of the module whose ``forward`` created it.
        counted: Paths of modules that counted a batch in their ``num_batches_tracked`` themselves.
        evaluated: Paths of the layers that the forward itself puts in evaluation.
        fixed: Whether the graph may contain sizes of the inputs as constants.
    """

    graph_module: fx.GraphModule
    scopes: dict[str, Any]
    counted: set[str]
    evaluated: set[str]
    fixed: bool = False


_LAYERS = (*WEIGHTED, nn.modules.batchnorm._NormBase)


def holds_no_layer(module: nn.Module) -> bool:
    """Whether a module contains nothing to quantize, fold or freeze, so that it may be called as a whole."""
    return not any(isinstance(inner, _LAYERS) for inner in module.modules())


def is_foreign(target: Any) -> bool:
    """Whether a function is Python code of another package, which is in a graph only after ``torch.fx.wrap``."""
    ours = ("torch", "qat_lightning", "operator", "builtins", "math", "_operator")
    return isinstance(target, FunctionType) and target.__module__.partition(".")[0] not in ours


class NetworkTracer(StructuredTracer):
    """Traces a network in its present mode, training or evaluation.

    Args:
        leaves: Paths of modules to call as a whole.
        buffers: Whether buffers that are computed with are values of the graph too; otherwise they are constants of it.

    Attributes:
        layer_settings: Records with which settings layers are called.
    """

    def __init__(self, leaves: list[str], *, buffers: bool = True) -> None:
        super().__init__(leaves, [])
        self._buffers = buffers
        self._opaque = set[Any]()
        self._generators: list[Any] = []
        self._replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.layer_settings: LayerSettings | None = None

    def proxy(self, node: fx.Node) -> Proxy:
        """A value of the graph."""
        return TracedValue(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        """A value of the graph for each tensor of the network, except counters, which are updated."""
        if not isinstance(attr_val, Tensor) or attr == _COUNTER:
            return attr_val
        if not (self._buffers or isinstance(attr_val, nn.Parameter)):
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy(
                "get_attr", name, (), {}, proxy_factory_fn=lambda node: TensorProxy(node, self, attr_val)
            )
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """The representation of ``a`` in the graph."""
        if isinstance(a, torch.Generator):
            raise FxTraceError(
                "a graph cannot hold a torch.Generator: leave generator= out, so that PyTorch's default one is used, "
                "or draw in a module without layers"
            )
        return super().create_arg(self.as_constant(a))

    def _random_state(self) -> tuple[Any, ...]:
        return random_state(), states_of(self._generators)

    def as_constant(self, a: Any) -> Any:
        """A tensor that a forward assigned to a buffer during the trace, turned into one that is not a buffer.

        Raises:
            OwnGradient: It was computed from parameters that the trace did not see, as ``self.parameters()``.
        """
        if isinstance(a, Tensor) and a.grad_fn is not None:
            raise OwnGradient("a tensor computed from parameters that are not read as attributes")
        if not isinstance(a, Tensor) or isinstance(a, nn.Parameter) or id(a) in self._names:
            return a
        if id(a) not in self._replaced and any(a is buffer for buffer in self.root.buffers()):
            self._replaced[id(a)] = a, a.detach()
        return self._replaced.get(id(a), (a, a))[1]

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """The result of a node; a function marked with ``torch.fx.wrap`` is traced through if possible.

        A file may only call functions of torch.
        """
        if kind == "call_function" and is_foreign(target) and target not in self._opaque:
            found, result = self._traced_through(target, args, kwargs)
            if found:
                return result
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)

    def _traced_through(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        last, before = next(iter(reversed(self.graph.nodes))), self._random_state()
        try:
            result = function(*args, **kwargs)
        except Exception:  # noqa: BLE001 - a module that cannot be traced is called as a whole
            result = None
        else:
            if self._random_state() == before:
                return True, result
        self._opaque.add(function)
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        return False, None

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node, marked if gradients are off."""
        node = super().create_node(kind, target, *args, **kwargs)
        if kind.startswith("call_") and not torch.is_grad_enabled():
            node.meta[STOPPED] = True
        return node

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace ``root``; see `torch.fx.Tracer.trace`.

        Raises:
            CallAsWhole: A module has to be called as a whole.
            DecidesByChance: Random numbers were drawn.
        """
        self._generators = generators_of(root)
        self._names = {id(tensor): name for name, tensor in [*root.named_buffers(), *root.named_parameters()]}
        before = self._random_state()
        with _wrapped_without_marks(), answering_kinds(root):
            graph = super().trace(root, concrete_args)
        if self._random_state() != before:
            raise DecidesByChance("")
        return graph

    def is_of_no_network(self, module: nn.Module) -> bool:
        """Whether a module was created by a forward, such as a loss, and is empty: it is traced through."""
        if module in (self.submodule_paths or {}):
            return False
        return next(module.parameters(), None) is None and next(module.buffers(), None) is None

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace through a module, or call it as a whole.

        Raises:
            CallAsWhole: It cannot be traced, or draws random numbers, and contains no layer.
            DecidesByChance: It draws random numbers and contains layers.
        """
        if self.is_of_no_network(m):
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            if self.layer_settings is not None:
                self.layer_settings.note(path, m)
            return super().call_module(m, forward, args, kwargs)
        before = self._random_state()
        try:
            result = super().call_module(m, forward, args, kwargs)
        except (CallAsWhole, Checkpointed, DecidesByChance):
            raise
        except Exception as error:
            if holds_no_layer(m):
                raise CallAsWhole(path) from error
            raise
        if self._random_state() != before:
            raise CallAsWhole(path) if holds_no_layer(m) else DecidesByChance(path)
        return result


@contextmanager
def _wrapped_without_marks() -> Iterator[None]:
    """Within the block, functions marked with ``torch.fx.wrap`` may return anything when called in a trace.

    Torch's own wrapper expects a single node and marks it. For a function that is traced through, that is a node of
    torch, under whose name code generated from the graph would be registered: all later traces in the process would
    look for a global with that name and fail.
    """

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            proxy: Any = torchs_tracing._find_proxy(args, kwargs)
            if proxy is None:
                return function(*args, **kwargs)
            return proxy.tracer.create_proxy("call_function", function, args, kwargs)

        return call

    before = torchs_tracing._create_wrapped_func
    torchs_tracing._create_wrapped_func = wrapped  # type: ignore[assignment]
    try:
        yield
    finally:
        torchs_tracing._create_wrapped_func = before


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


@contextmanager
def counting(network: nn.Module) -> Iterator[set[str]]:
    """Record which modules count a batch within the block; everything else, including the random state, is restored.

    Each trace recomputes what a forward stores in its module, such as a table for the current size, and reinstalls
    hooks that it adds on the first call, as transformers does to collect the outputs of layers.
    """
    attributes = {module: (dict(vars(module)), dict(module._buffers)) for module in network.modules()}
    hooks = [(vars(module)[name], dict(vars(module)[name])) for module in attributes for name in _HOOKS]
    containers = [
        (value, copy.copy(value))
        for module in attributes
        for name, value in vars(module).items()
        if isinstance(value, (dict, list, set)) and is_own(name)
    ]
    kept = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
    counted: set[str] = set()
    with torch.random.fork_rng(devices=[]), generators_kept(network), torch.no_grad():
        python = random.getstate()
        try:
            yield counted
        finally:
            random.setstate(python)
            for name, buffer in network.named_buffers():
                if name.rpartition(".")[2] == _COUNTER and not torch.equal(buffer, kept[name]):
                    counted.add(name.rpartition(".")[0])
            for module, before in attributes.items():
                _give_back(module, *before)
            for container, before_call in containers:
                _refill(container, before_call)
            for now, had in hooks:
                for added in now.keys() - had.keys():
                    del now[added]
            for name, buffer in network.named_buffers():
                write_back(buffer, kept[name])


def _give_back(module: nn.Module, attributes: dict[str, Any], buffers: dict[str, Any]) -> None:
    """Restore a module's attributes and buffers, except constants of the trace."""
    made = {name: value for name, value in vars(module).items() if name.startswith(CONSTANTS)}
    module.__dict__.clear()
    module.__dict__.update(attributes | made)
    module._buffers.clear()
    module._buffers.update(buffers)


def _refill(container: Any, before: Any) -> None:
    """Restore what is in a container, such as a cache in which a trace has left its values."""
    if isinstance(container, list):
        container[:] = before
    else:
        container.clear()
        container.update(before)


@contextmanager
def batchnorms_take_anything() -> Iterator[None]:
    """Let ``super().forward`` of a BatchNorm subclass be traced, which checks its input's dimensions."""
    kinds: list[Any] = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
    before = [cls._check_input_dim for cls in kinds]
    for cls in kinds:
        cls._check_input_dim = lambda self, input: None
    try:
        yield
    finally:
        for cls, check in zip(kinds, before, strict=True):
            cls._check_input_dim = check
