"""All ways to write a product: each becomes the operator ``@``, or a linear layer if a factor is a parameter.

``einsum`` and ``tensordot`` of two tensors are a matrix product once their dimensions are ordered: first those that
both factors and the result have, then those of one factor, then those that are summed over. Only views are needed for
that.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat_lightning.graph.example import Example
from qat_lightning.graph.training_flags import evaluating
from qat_lightning.modes.fx.linear_products import take_bias
from qat_lightning.modes.fx.product_labels import Terms, terms_of, written_by_labels
from qat_lightning.modes.fx.product_sums import add_up, sum_of
from qat_lightning.modes.fx.weights import is_constant
from qat_lightning.modes.places import op_name
from qat_lightning.modes.recording import Recorder, example_values

_Factor = tuple[fx.Node, str]
"""A value, with a letter for each of its dimensions."""

_PLAIN = (torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.linalg.matmul)
_PLAIN_METHODS = ("matmul", "mm", "bmm", "mv", "dot", "__matmul__")
_FACTORS = (("input", "self"), ("other", "mat2", "vec", "tensor"))
"""The names of both factors in these functions."""


@torch.no_grad()
def write_as_products(
    graph_module: fx.GraphModule, network: nn.Module, example: Example, scopes: dict[str, Any]
) -> None:
    """Write every product as ``a @ b``, or as ``F.linear`` if ``b`` is computed from parameters.

    Args:
        graph_module: A trace; changed in place.
        network: The traced network.
        example: One call.
        scopes: Scopes of its nodes; new nodes get the scope of the product.
    """
    for node in list(graph_module.graph.nodes):
        _name_operator(node)
        _take_apart_linear(graph_module, node, scopes)
    found = [node for node in graph_module.graph.nodes if written_by_labels(node)]
    if found:
        with evaluating(graph_module, network):
            recorder = Recorder(graph_module, graph_module.graph)
            recorder.run(*example_values(graph_module.graph, example))
        for node in found:
            terms = terms_of(node, recorder.values)
            if terms is not None:
                _Writing(graph_module, node, recorder.values, scopes).write(terms)
    graph_module.recompile()


def _name_operator(node: fx.Node) -> None:
    """Use the operator for functions that only multiply two tensors."""
    plain = _PLAIN if node.op == "call_function" else _PLAIN_METHODS if node.op == "call_method" else ()
    if node.target not in plain:
        return
    given, named = list(node.args), dict(node.kwargs)
    for names in _FACTORS[len(given) :]:
        given += [named.pop(name) for name in names if name in named]
    if len(given) == 2 and not named:
        node.op, node.target, node.args, node.kwargs = "call_function", operator.matmul, tuple(given), {}


def _take_apart_linear(root: fx.GraphModule, node: fx.Node, scopes: dict[str, Any]) -> None:
    """Split ``addmm`` with a weight into product and sum; `name_linear` handles exact linear layers."""
    given = sum_of(node)
    if given is None or op_name(node.target) != "addmm" or not is_weight(root, given["two"]):
        return
    if node.target is torch.addmm and not node.kwargs and is_weight(root, given["input"]):
        return
    with root.graph.inserting_before(node):
        product = root.graph.call_function(operator.matmul, (given["one"], given["two"]))
        made = [product, *add_up(root.graph, given, product)]
    scopes.update({new.name: scopes[node.name] for new in made if node.name in scopes})
    node.replace_all_uses_with(made[-1])
    root.graph.erase_node(node)


def is_weight(root: nn.Module, node: fx.Node) -> bool:
    """Whether a factor is computed from parameters, which a layer can pack."""
    if not is_constant(node):
        return False
    if node.op == "get_attr":
        return isinstance(operator.attrgetter(str(node.target))(root), nn.Parameter)
    return any(is_weight(root, source) for source in node.all_input_nodes)


class _Writing:
    """Replaces one call by products.

    Args:
        root: The trace.
        node: The call.
        values: Values of the nodes on the example.
        scopes: Scopes of the nodes.
    """

    def __init__(self, root: fx.GraphModule, node: fx.Node, values: Mapping[str, Any], scopes: dict[str, Any]) -> None:
        self.root, self.graph, self.node, self.values, self.scopes = root, root.graph, node, values, scopes

    def write(self, terms: Terms) -> None:
        """Multiply from left to right."""
        factors, labels, result = terms
        with self.graph.inserting_before(self.node):
            made, have = factors[0], labels[0]
            for number, (factor, its) in enumerate(zip(factors[1:], labels[1:], strict=True), start=1):
                later = set(result).union(*labels[number + 1 :])
                made, have = self._product((made, have), (factor, its), later)
            made = self._ordered((made, have), result)
        self.node.replace_all_uses_with(made)
        self.graph.erase_node(self.node)
        if made.target is F.linear:
            take_bias(self.root, made)

    def _product(self, one: _Factor, other: _Factor, keep: set[str]) -> _Factor:
        if is_weight(self.root, one[0]) and not is_weight(self.root, other[0]):
            one, other = other, one
        has, (b, its) = one[1], other
        both = [label for label in has if label in its and label in keep]
        summed = "".join(label for label in has if label in its and label not in keep)
        left = "".join(label for label in has if label not in its)
        right = "".join(label for label in its if label not in has)
        if is_weight(self.root, b) and left and right and not both:
            return self._linear(one, other, left, right, summed)
        return self._matmul(one, other, "".join(both), left, right, summed)

    def _linear(self, one: _Factor, other: _Factor, left: str, right: str, summed: str) -> _Factor:
        """A linear layer whose weight is the parameter with its dimensions reordered."""
        sizes = dict(zip(other[1], self.values[other[0].name].shape, strict=True))
        x, weight = self._ordered(one, left + summed), self._ordered(other, right + summed)
        if len(summed) > 1:
            x = self._method("flatten", x, -len(summed), -1)
        if len(summed) > 1 or len(right) > 1:
            weight = self._method("reshape", weight, math.prod(sizes[label] for label in right), -1)
        made = self._add("call_function", F.linear, x, weight)
        if len(right) > 1:
            made = self._method("unflatten", made, -1, tuple(sizes[label] for label in right))
        return made, left + right

    def _matmul(self, one: _Factor, other: _Factor, both: str, left: str, right: str, summed: str) -> _Factor:
        """The operator; dimensions of a factor beyond its rows or columns are broadcast."""
        rows, columns = left[-1:], right[-1:]
        a = self._ordered(one, both + left[:-1] + rows + summed)
        b = self._ordered(other, both + right[:-1] + summed + columns)
        if len(summed) > 1:
            a, at = self._method("flatten", a, -len(summed), -1), len(both) + len(right[:-1])
            b = self._method("flatten", b, at, at + len(summed) - 1)
        for _ in right[:-1]:
            a = self._method("unsqueeze", a, len(both) + len(left[:-1]))
        for _ in left[:-1] if both else "":
            b = self._method("unsqueeze", b, len(both))
        a = a if rows else self._method("unsqueeze", a, -2)
        b = b if columns else self._method("unsqueeze", b, -1)
        made = self._add("call_function", operator.matmul, a, b)
        made = made if columns else self._method("squeeze", made, -1)
        made = made if rows else self._method("squeeze", made, -2 if columns else -1)
        return made, both + left[:-1] + right[:-1] + rows + columns

    def _ordered(self, factor: _Factor, want: str) -> fx.Node:
        """A value with its dimensions reordered."""
        node, have = factor
        order = tuple(have.index(label) for label in want)
        moved = [place for place, before in enumerate(order) if place != before]
        if not moved:
            return node
        if len(moved) == 2:
            return self._method("transpose", node, *moved)
        return self._method("permute", node, order)

    def _method(self, name: str, *args: Any) -> fx.Node:
        return self._add("call_method", name, *args)

    def _add(self, op: str, target: Any, *args: Any) -> fx.Node:
        made = self.graph.create_node(op, target, args)
        if self.node.name in self.scopes:
            self.scopes[made.name] = self.scopes[self.node.name]
        return made
