"""Dropout that stays active in evaluation: it scales values beyond its input's grid, and stays float in mode fx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx


def hide_lasting_dropouts(graph: fx.Graph) -> Callable[[fx.Graph], list[str]]:
    """Hide calls of dropout with ``training=True`` from upstream's prepare, which assumes that they keep the grid.

    Args:
        graph: A traced graph, about to be prepared.

    Returns:
        A function that restores them in the prepared graph and returns their names.
    """
    for node in graph.nodes:
        if node.target is F.dropout and _lasts(node):
            node.target = _lasting

    def show(prepared: fx.Graph) -> list[str]:
        names = []
        for node in prepared.nodes:
            if node.target is _lasting:
                node.target = F.dropout
                names.append(node.name)
        return names

    return show


def _lasts(node: fx.Node) -> bool:
    """Whether it is active in evaluation too; in a traced graph, a flag that follows the mode is a node."""
    return (node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)) is True


def _lasting(*args: Any, **kwargs: Any) -> Any:
    return F.dropout(*args, **kwargs)
