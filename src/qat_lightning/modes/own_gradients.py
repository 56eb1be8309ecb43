"""Gradients that a forward decides itself: an `autograd.Function`, a hook on a tensor, ``torch.no_grad``.

A graph contains the forward computation only. What stops a gradient is written into the graph; anything else is called
as a whole, or refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_leaves

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.graph.training_flags import evaluating
from qat_lightning.layers.relu_rounding import writes_in_place
from qat_lightning.modes.checkpointing import raised_in_training
from qat_lightning.modes.recording import example_values, run_of
from qat_lightning.modes.source_lines import line_at_fault

STOPPED = "without gradient"
"""Key in the ``meta`` of nodes that are traced without gradients: if the graph is to be trained, those that a forward
computes within ``torch.no_grad()``."""


class OwnGradient(Exception):
    """A forward defines a gradient of its own where a graph would lose it; the argument says what defines it."""


@contextmanager
def no_own_gradients(follows: Callable[[Any], bool]) -> Iterator[None]:
    """Within the block, with gradients on, raise `OwnGradient` where a network defines that of a followed value itself.

    Works under whatever name ``apply`` of an `autograd.Function` was stored: the method that it calls is replaced.

    Args:
        follows: Whether a gradient would flow into a value, an argument of the function.
    """
    hook: Any = Tensor.register_hook

    def refusing(cls: Any, *args: Any, **kwargs: Any) -> Any:
        own = not cls.__module__.startswith("torch.")  # such as torch.cond, whose gradient a graph has
        if own and torch.is_grad_enabled() and any(map(follows, tree_leaves((args, kwargs)))):
            raise OwnGradient(f"{cls.__name__}.apply")
        return super(_SingleLevelFunction, cls).apply(*args, **kwargs)

    def refusing_hook(tensor: Tensor, function: Any) -> Any:
        if follows(tensor):
            raise OwnGradient("register_hook")
        return hook(tensor, function)

    _SingleLevelFunction.apply = classmethod(refusing)  # type: ignore[attr-defined]
    Tensor.register_hook = refusing_hook  # type: ignore[method-assign]
    try:
        with torch.enable_grad():
            yield
    finally:
        del _SingleLevelFunction.apply  # type: ignore[attr-defined]
        Tensor.register_hook = hook  # type: ignore[method-assign]


def is_traced(value: Any) -> bool:
    """Whether a value belongs to a symbolic trace."""
    return isinstance(value, fx.Proxy)


def requires_grad(value: Any) -> bool:
    """Whether a gradient flows into a value."""
    return isinstance(value, Tensor) and value.requires_grad


def loses_gradient(network: nn.Module, mode: str, error: OwnGradient) -> TraceError:
    """The error for a network that defines a gradient of its own.

    Args:
        network: The float network.
        mode: The mode that captures it as one graph.
        error: Raised where the gradient is defined.
    """
    where = line_at_fault(error)
    return TraceError(
        f"{type(network).__name__}.forward has a gradient that the graph of mode={mode!r} would lose "
        f"({error}{f' at {where}' if where else ''}): it would train with another one. What to do: use mode='eager', "
        "which keeps it, or mode='fx' with this part in a module that contains no layers, which is called as a whole."
    )


def refuse_own_gradients(network: nn.Module, example: Example, mode: str) -> None:
    """Run a copy of a network in training mode until it defines a gradient of its own.

    Args:
        network: The float network.
        example: One call.
        mode: Mode for the message.

    Raises:
        TraceError: It does.
    """
    error = raised_in_training(network, example, no_own_gradients(requires_grad), OwnGradient)
    if error is not None:
        raise loses_gradient(network, mode, error)


def stop_gradients(graph_module: fx.GraphModule, scopes: dict[str, Any], network: nn.Module, example: Example) -> None:
    """Detach what was computed within ``torch.no_grad()`` where it is read outside, or written into a buffer.

    Args:
        graph_module: A trace whose nodes are marked with `STOPPED`.
        scopes: The scope of each node; gets those of new ones.
        network: The float network.
        example: One call.

    Raises:
        TraceError: A tensor that has a gradient is changed in place there.
    """
    graph = graph_module.graph
    inside = {node for node in graph.nodes if node.meta.pop(STOPPED, False)}
    if not inside:
        return
    with evaluating(network, graph_module), torch.random.fork_rng(devices=[]):
        values = run_of(graph_module, graph, example_values(graph, example))
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    buffers = {name for name, _ in network.named_buffers(remove_duplicate=False)}
    for node in [node for node in graph.nodes if node in inside]:
        value, (first, *others) = values[node.name], node.all_input_nodes or [node]
        if writes_in_place(node, modules.get(str(node.target))):
            if first not in inside and str(first.target) not in buffers:
                raise _writes_in_place(network, node)
            for other in others:
                _detach(graph, scopes, other, {node})
        elif any(value is values[source.name] for source in (first, *others) if source not in inside):
            continue  # the tensor itself, which keeps its gradient
        if not isinstance(value, Tensor):
            inside.update(user for user in node.users if user.target in _PARTS)
        elif value.is_floating_point() or value.is_complex():
            _detach(graph, scopes, node, {user for user in node.users if user not in inside})


_PARTS = (operator.getitem, getattr)
"""Functions that take a value out of a container."""


def _detach(graph: fx.Graph, scopes: dict[str, Any], node: fx.Node, readers: set[fx.Node]) -> None:
    if readers:
        with graph.inserting_after(node):
            detached = graph.call_method("detach", (node,))
        if node.name in scopes:
            scopes[detached.name] = scopes[node.name]
        node.replace_all_uses_with(detached, delete_user_cb=lambda user: user in readers)


def _writes_in_place(network: nn.Module, node: fx.Node) -> TraceError:
    return TraceError(
        f"{type(network).__name__}.forward changes a tensor that has a gradient in place within torch.no_grad() "
        f"({node.name!r}), which the graph of mode='fx' cannot hide from its gradient. What to do: compute the new "
        "value out of place, do this outside of forward, or use mode='eager', which keeps it."
    )
