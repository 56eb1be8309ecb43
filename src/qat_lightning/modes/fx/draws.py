"""Mode fx: dropout that goes on in evaluation. It scales values beyond the grid of its input, and stays float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx


def hide_lasting_dropouts(graph: fx.Graph) -> Callable[[fx.Graph], list[str]]:
    """Hide calls of dropout with ``training=True`` from upstream's prepare, which takes them to keep the grid.

    Args:
        graph: Traced, about to be prepared.

    Returns:
        What shows them again in the graph that was made of this one, and returns their names.
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
    """Whether it drops in evaluation too; in a traced graph a flag that follows the mode is a node."""
    return (node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)) is True


def _lasting(*args: Any, **kwargs: Any) -> Any:
    return F.dropout(*args, **kwargs)
