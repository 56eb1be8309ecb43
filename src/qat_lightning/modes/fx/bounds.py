"""Clamps whose limits are tensors stay float in mode fx: upstream would put input and limits on one grid.

Limits are not values of the network: a checkpoint may contain infinite ones, where nothing is clamped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from qat_lightning.modes.places import op_name

_CLAMPS = frozenset({"clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"})


def hide_bounded(graph_module: fx.GraphModule) -> Callable[[fx.GraphModule], list[str]]:
    """Hide clamps with tensor limits from upstream's prepare, which would give their arguments one range.

    Args:
        graph_module: A trace; changed in place.

    Returns:
        A function that restores them in the prepared graph and returns their names.
    """
    hidden: dict[str, tuple[str, Any]] = {}
    for node in graph_module.graph.nodes:
        if any(isinstance(bound, fx.Node) for bound in _bounds(node)):
            hidden[node.name] = (node.op, node.target)
            node.op, node.target = "call_function", _bounded

    def show(prepared: fx.GraphModule) -> list[str]:
        for node in prepared.graph.nodes:
            if node.name in hidden:
                node.op, node.target = hidden[node.name]
        prepared.recompile()
        return list(hidden)

    return show


def _bounds(node: fx.Node) -> list[Any]:
    if node.op not in ("call_function", "call_method") or op_name(node.target) not in _CLAMPS:
        return []
    return [*node.args[1:], *(value for name, value in node.kwargs.items() if name in ("min", "max"))]


def _bounded(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("stands for a clamp while upstream prepares the graph, and is never run")
