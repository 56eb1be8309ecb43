"""Operand order of int8 additions and products in mode fx: the larger one comes first."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

_COMMUTE = (operator.add, operator.mul, torch.add, torch.mul)


def put_larger_first(graph: fx.Graph, values: Mapping[str, Any]) -> None:
    """Make the operand that is broadcast the second one.

    The kernels allocate their result in the shape of the first operand, and resize it with a warning if that is
    smaller. Sums and products of two floats are bit-equal in either order.

    Args:
        graph: A prepared graph; changed in place.
        values: Values of its nodes on the example.
    """
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _COMMUTE or len(node.args) != 2 or node.kwargs:
            continue
        first, second = (values.get(arg.name) if isinstance(arg, fx.Node) else None for arg in node.args)
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            continue
        if first.shape != second.shape and second.shape == values[node.name].shape:
            node.args = (node.args[1], node.args[0])
