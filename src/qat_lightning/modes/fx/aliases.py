"""Functions with several names: upstream knows only one of each, and leaves the others float."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_FUNCTIONS: dict[Any, Any] = {
    torch.relu: F.relu,
    torch.concat: torch.cat,
    torch.concatenate: torch.cat,
    torch.max_pool1d: F.max_pool1d,
    torch.max_pool2d: F.max_pool2d,
    torch.max_pool3d: F.max_pool3d,
}
"""Functions with the same arguments in the same order."""

_IN_PLACE: dict[Any, Any] = {
    torch.relu_: F.relu,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.hardtanh_: F.hardtanh,
}
"""In-place functions; their counterparts have an argument for that."""

_OF_TWO: dict[Any, Any] = {
    torch.multiply: torch.mul,
    torch.clamp_min: torch.clamp,
    "add": torch.add,
    "mul": torch.mul,
    "multiply": torch.mul,
    "clamp_min": torch.clamp,
}
"""Functions with a twin if called with two positional arguments; others have more, such as ``alpha=``."""


def use_known_names(graph: fx.Graph) -> None:
    """Replace functions by the equivalent ones that upstream knows.

    Args:
        graph: A trace; changed in place.
    """
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        target = node.target
        if target in _FUNCTIONS and "axis" not in node.kwargs:
            node.target = _FUNCTIONS[target]
        elif target in _IN_PLACE:
            node.target, node.kwargs = _IN_PLACE[target], {**node.kwargs, "inplace": True}
        elif target in _OF_TWO and len(node.args) == 2 and not node.kwargs:
            node.op, node.target = "call_function", _OF_TWO[target]
