"""What int8 additions and products of mode fx want of their operands: the larger one first."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

_COMMUTE = (operator.add, operator.mul, torch.add, torch.mul)


def put_larger_first(graph: fx.Graph, values: Mapping[str, Any]) -> None:
    """Let the operand that is broadcast be the second.

    The kernels make their result in the shape of the first and resize it, with a warning of torch's, where it is
    smaller. Sums and products of two floats are the same either way, bit for bit.

    Args:
        graph: A prepared one; changed.
        values: Of its nodes, on the example.
    """
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _COMMUTE or len(node.args) != 2 or node.kwargs:
            continue
        first, second = (values.get(arg.name) if isinstance(arg, fx.Node) else None for arg in node.args)
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            continue
        if first.shape != second.shape and second.shape == values[node.name].shape:
            node.args = (node.args[1], node.args[0])
