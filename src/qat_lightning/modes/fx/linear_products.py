"""Products with a weight that are equivalent to linear layers, such as ``addmm(b, x, w)`` or ``x @ w.T + b``."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat_lightning.modes.fx.weights import constant_value

_PRODUCTS = (torch.mm, torch.matmul, operator.matmul, "matmul", "mm")
_SUMS = (operator.add, torch.add, "add")
_TURNS = {("t",), ("transpose", 0, 1), ("transpose", 1, 0), ("transpose", -1, -2), ("transpose", -2, -1)}
"""Ways to transpose a matrix: a method and its arguments."""


def name_linear(graph_module: fx.GraphModule, scopes: dict[str, Any]) -> None:
    """Replace products with a weight by ``F.linear``, which has an int8 kernel with one scale per output channel.

    Args:
        graph_module: A trace; changed in place.
        scopes: Scopes of its nodes; new nodes get the scope of the product.
    """
    graph = graph_module.graph
    found = {node: factors for node in graph.nodes if (factors := _factors(graph_module, node)) is not None}
    for node, (given, weight, bias) in found.items():
        turned = _turned(weight)
        if turned is None:
            with graph.inserting_before(node):
                turned = graph.call_method("t", (weight,))
            if node.name in scopes:
                scopes[turned.name] = scopes[node.name]
        node.op, node.target, node.args = "call_function", F.linear, (given, turned, *bias)
        if not weight.users:
            graph.erase_node(weight)  # only this node: a write through a view has no reader, but is not dead code
        if not bias:
            take_bias(graph_module, node)
    if found:
        graph_module.recompile()


def _factors(root: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """Input, weight (input by output channels) and bias of a product; None if it has no weight."""
    if node.kwargs or node.op not in ("call_function", "call_method"):
        return None
    if node.target is torch.addmm:
        bias, *factors = node.args
        if not _is_parameter(root, bias, 1):
            return None
        given_bias: list[Any] = [bias]
    elif node.target in _PRODUCTS:
        factors, given_bias = list(node.args), []
    else:
        return None
    given, weight = factors
    if not isinstance(given, fx.Node) or not isinstance(weight, fx.Node) or given.op == "get_attr":
        return None
    source = _turned(weight) or weight
    return (given, weight, given_bias) if _is_parameter(root, source, 2) else None


def _turned(node: fx.Node) -> fx.Node | None:
    """The node that a node transposes."""
    if node.op == "call_method" and (node.target, *node.args[1:]) in _TURNS:
        source: Any = node.args[0]
    elif node.op == "call_function" and node.target is getattr and node.args[1] in ("T", "mT"):
        source = node.args[0]
    else:
        return None
    return source if isinstance(source, fx.Node) else None


@torch.no_grad()
def take_bias(root: fx.GraphModule, linear: fx.Node) -> None:
    """Use a parameter vector that is added to a linear layer's output as its bias, if nothing else reads the output."""
    users = list(linear.users)
    if len(users) != 1 or users[0].target not in _SUMS or users[0].kwargs or len(users[0].args) != 2:
        return
    total = users[0]
    bias = next((arg for arg in total.args if arg is not linear), None)
    if not isinstance(bias, fx.Node) or not _is_parameter(root, bias, 1):
        return
    if constant_value(root, bias).shape != constant_value(root, linear.args[1]).shape[:1]:
        return
    with root.graph.inserting_before(linear):
        first = root.graph.node_copy(bias)
    linear.args = (*linear.args, first)
    total.replace_all_uses_with(linear)
    root.graph.erase_node(total)


def _is_parameter(root: nn.Module, node: Any, dimensions: int) -> bool:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    value = constant_value(root, node)
    return isinstance(value, nn.Parameter) and value.ndim == dimensions
