"""Pickling graphs as plain rows: upstream's metadata in a graph refers to objects that do not pickle."""

from __future__ import annotations

import copy
import functools
import importlib
import operator
import sys
import types
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate as _map

Row = tuple[str, str, Any, Any, Any, dict[str, Any]]
"""Op, name, target, positional and keyword arguments, and metadata of a node."""


class _Node(str):
    """The name of another node, among the arguments of one."""

    __slots__ = ()


class _Operator(str):
    """The name of an operator in ``torch.ops``; the operator itself does not pickle."""

    __slots__ = ()


class _Function(str):
    """``module:name`` of a function that cannot be found by its ``__qualname__``, such as ``F.max_pool2d``."""

    __slots__ = ()


class PortableGraph:
    """Holds a graph while it is pickled or copied. Upstream makes the copies; pickles omit metadata of the capture.

    Args:
        graph: The graph.

    Example:
        >>> import pickle
        >>> graph = fx.symbolic_trace(torch.nn.ReLU()).graph
        >>> [node.name for node in pickle.loads(pickle.dumps(PortableGraph(graph))).graph.nodes]
        ['input_1', 'relu', 'output']
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> PortableGraph:
        return PortableGraph(copy.deepcopy(self.graph, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _portable, (_rows(self.graph),)


class PortableModule:
    """Holds a graph module while it is pickled: upstream would trace it again, and precompute what depends on no input.

    Integer weights would then come out of a pickle as float weights.

    Args:
        module: The graph module; graph modules within it are held too, and other submodules are pickled as they are.

    Example:
        >>> import pickle
        >>> traced = fx.symbolic_trace(torch.nn.Linear(2, 1))
        >>> [node.name for node in pickle.loads(pickle.dumps(PortableModule(traced))).module.graph.nodes]
        ['input_1', 'weight', 'bias', 'linear', 'output']
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def __reduce__(self) -> tuple[Any, ...]:
        names = {str(node.target) for node in self.module.graph.nodes if node.op in ("get_attr", "call_module")}
        values = {name: operator.attrgetter(name)(self.module) for name in sorted(names)}
        held = {
            name: PortableModule(value) if isinstance(value, fx.GraphModule) else value
            for name, value in values.items()
        }
        return _portable_module, (held, PortableGraph(self.module.graph), self.module.training)


def _portable_module(held: dict[str, Any], graph: PortableGraph, training: bool) -> PortableModule:
    values = {name: value.module if isinstance(value, PortableModule) else value for name, value in held.items()}
    module = fx.GraphModule(values, graph.graph)
    module.training = training
    return PortableModule(module)


def hold_graphs(state: dict[str, Any]) -> dict[str, Any]:
    """An object's attributes, with graphs replaced by `PortableGraph`: for ``__getstate__``."""
    return {name: PortableGraph(value) if isinstance(value, fx.Graph) else value for name, value in state.items()}


def release_graphs(state: dict[str, Any]) -> dict[str, Any]:
    """Undo `hold_graphs`: for ``__setstate__``."""
    return {name: value.graph if isinstance(value, PortableGraph) else value for name, value in state.items()}


class HoldsGraphs:
    """Mixin for objects that are pickled and have graphs among their attributes."""

    def __getstate__(self) -> dict[str, Any]:
        return hold_graphs(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(release_graphs(state))


def _rows(graph: fx.Graph) -> list[Row]:
    return [
        (node.op, node.name, _pack(node.target), _map(node.args, _pack), _map(node.kwargs, _pack), _notes(node))
        for node in graph.nodes
    ]


def _portable(rows: list[Row]) -> PortableGraph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def unpack(value: Any) -> Any:
        if isinstance(value, _Node):
            return nodes[value]
        if isinstance(value, _Operator):
            return functools.reduce(getattr, value.split("."), torch.ops)
        if isinstance(value, _Function):
            module, _, name = value.partition(":")
            return getattr(importlib.import_module(module), name)
        return value

    for op, name, target, args, kwargs, notes in rows:
        node = graph.create_node(op, unpack(target), _map(args, unpack), _map(kwargs, unpack), name)
        node.meta = dict(notes)
        nodes[name] = node
    return PortableGraph(graph)


def _pack(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _Node(value.name)
    if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _Operator(str(value))
    if isinstance(value, torch._ops.HigherOrderOperator):
        return _Operator(f"higher_order.{value.name()}")
    if isinstance(value, types.FunctionType) and "<locals>" in value.__qualname__:
        module, name = value.__module__, value.__name__
        if getattr(sys.modules.get(module), name, None) is value:
            return _Function(f"{module}:{name}")
    return value


def _notes(node: fx.Node) -> dict[str, Any]:
    """Metadata that conversion reads: the module that a node comes from, and which argument is the weight."""
    notes: dict[str, Any] = {}
    if stack := node.meta.get("nn_module_stack"):
        notes["nn_module_stack"] = {key: (name, _type_name(cls)) for key, (name, cls) in stack.items()}
    if wanted := node.meta.get("target_dtype_info"):
        kept = ("weight_index", "bias_index")
        notes["target_dtype_info"] = {key: value for key, value in wanted.items() if key in kept}
    return notes


def _type_name(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}" if isinstance(cls, type) else str(cls)
