"""Capturing a network once for rehearsal and preparation, because export is most of the cost of preparing.

The graph is kept without weights. It is combined with the weights of a network that matches the captured one: the same
modules, parameters and buffers of the same names and shapes, called in the same way.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from qat_lightning.graph.example import Example

T = TypeVar("T")

_kept: ContextVar[dict[Any, tuple[_Template, Any]] | None] = ContextVar("captured", default=None)


@contextmanager
def captured_once() -> Iterator[None]:
    """Within the block, a network and its copies under the same name are captured once.

    Only weights may change in them within the block.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def captured(
    network: nn.Module, example: Example, name: str, capture: Callable[[], tuple[fx.GraphModule, T]]
) -> tuple[fx.GraphModule, T]:
    """The result of ``capture``, reused if this network was captured before within a `captured_once`.

    Args:
        network: The float network.
        example: The call that it is captured with.
        name: The network's name, since two networks of one class may differ in attributes other than modules and
            tensors.
        capture: Captures the network; returns a graph whose attributes are named as in the network.
    """
    kept = _kept.get()
    if kept is None:
        return capture()
    key = name, _likeness(network), _call(example)
    if key not in kept:
        graph_module, call = capture()
        kept[key] = _Template(graph_module, network), call
        return graph_module, call
    template, call = kept[key]
    return template.of(network), call


def _likeness(network: nn.Module) -> Any:
    return (
        tuple((name, type(module), module.extra_repr()) for name, module in network.named_modules()),
        tuple(
            (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            for name, tensor in _tensors(network).items()
        ),
    )


def _call(example: Example) -> Any:
    leaves, spec = pytree.tree_flatten((example.args, example.kwargs))
    return str(spec), tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    )


class _Template:
    """A captured graph without the tensors of its network."""

    def __init__(self, graph_module: fx.GraphModule, network: nn.Module) -> None:
        self._graph, self._meta = _copy_of(graph_module.graph), copy.copy(graph_module.meta)
        own = _tensors(network)
        targets = {str(node.target) for node in self._graph.nodes if node.op in ("get_attr", "call_module")}
        self._constants = {
            name: copy.deepcopy(operator.attrgetter(name)(graph_module)) for name in targets - own.keys()
        }
        self._own = targets & own.keys()

    def of(self, network: nn.Module) -> fx.GraphModule:
        """The graph with the tensors of a network."""
        own = _tensors(network)
        held = {name: own[name] for name in self._own} | copy.deepcopy(self._constants)
        graph_module = fx.GraphModule(held, _copy_of(self._graph))
        graph_module.meta = copy.copy(self._meta)
        return graph_module


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    return found | dict(network.named_buffers(remove_duplicate=False))


def _copy_of(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    made.output(made.graph_copy(graph, nodes))
    made.output_node().meta = copy.copy(graph.output_node().meta)
    for node, copied in nodes.items():
        copied._rename(node.name)
    return made
