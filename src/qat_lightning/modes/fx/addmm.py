"""Products with a parameter that are linear layers in all but name, such as those of GPT-2: ``addmm(b, x, w)``."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


def name_linear(graph_module: fx.GraphModule, scopes: dict[str, Any]) -> None:
    """Let ``addmm`` and ``mm`` with a weight be ``F.linear`` with its transpose, which has an int8 kernel.

    Args:
        graph_module: A trace; changed in place.
        scopes: Of its nodes; those that are added get the scope of the product.
    """
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in (torch.addmm, torch.mm) or node.kwargs:
            continue
        *bias, given, weight = node.args
        if not isinstance(given, fx.Node) or not _is_weight(graph_module, weight):
            continue
        if bias and not _is_parameter(graph_module, bias[0]):
            continue
        with graph_module.graph.inserting_before(node):
            transposed = graph_module.graph.call_method("t", (weight,))
        if node.name in scopes:
            scopes[transposed.name] = scopes[node.name]
        node.target, node.args = F.linear, (given, transposed, *bias)
    graph_module.recompile()


def _is_weight(root: nn.Module, node: Any) -> bool:
    return _is_parameter(root, node) and _read(root, node).ndim == 2


def _is_parameter(root: nn.Module, node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and isinstance(_read(root, node), nn.Parameter)


def _read(root: nn.Module, node: fx.Node) -> Tensor:
    value: Tensor = operator.attrgetter(str(node.target))(root)
    return value
