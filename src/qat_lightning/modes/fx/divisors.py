"""Divisors are not rounded in mode fx: ``x / (y + 1e-6)`` would be infinite if the divisor were rounded to zero."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat_lightning.layers.operators import MOVES
from qat_lightning.modes.places import op_name
from qat_lightning.numerics.fake_quantize import FakeQuantize

_DIVIDES = frozenset({"truediv", "itruediv", "div", "div_", "divide", "divide_", "true_divide", "floordiv"})
_NOT_OF_ZERO = frozenset(
    {"reciprocal", "reciprocal_", "rsqrt", "rsqrt_", "sqrt", "sqrt_", "log", "log_", "log2", "log10"}
)
"""Functions that are infinite at zero, or have an infinite gradient there."""

_STAYS_AWAY = frozenset({"add", "iadd", "add_", "clamp", "clamp_", "clamp_min", "clamp_min_", "abs", "abs_", "maximum"})
"""Names of ops that keep a divisor away from zero."""


def _divided_by(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """The nodes of divisors, and the nodes that they are made of, back to where they are computed."""
    found = set[fx.Node]()
    waiting = [node for user in graph.nodes for node in _divisors(user)]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        first = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)
        if first is not None and _passes_on(node, modules):
            waiting.append(first)
    return found


def leave_divisors_unrounded(prepared: fx.GraphModule) -> set[fx.Node]:
    """Never round divisors; their ranges stay, because checkpoints of earlier releases contain them.

    Args:
        prepared: The result of upstream's prepare; changed in place.

    Returns:
        The nodes of divisors, and the nodes that they are made of, back to where they are computed.
    """
    divisors = _divided_by(prepared.graph, dict(prepared.named_modules(remove_duplicate=False)))
    leave_unrounded(prepared, divisors, _only_divides)
    return divisors


def leave_unrounded(prepared: fx.GraphModule, values: set[fx.Node], only_reads: Callable[[fx.Node], bool]) -> None:
    """Stop rounding some values; their other readers still read the rounded values.

    Args:
        prepared: The result of upstream's prepare; changed in place.
        values: The nodes of the values, including roundings.
        only_reads: Whether a node reads them without being one of them.
    """
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in prepared.graph.find_nodes(op="call_module"):
        module = prepared.get_submodule(str(node.target))
        if isinstance(module, FakeQuantize) and module.source != "present":
            calls.setdefault(module, []).append(node)
    for module, nodes in calls.items():
        inside = [node for node in nodes if node in values and not _is_layer(node.args[0])]
        if len(inside) == len(nodes) and all(user in values or only_reads(user) for n in nodes for user in n.users):
            assert isinstance(module, FakeQuantize)
            module.left_float = True
            continue
        for node in inside:
            node.replace_all_uses_with(
                node.all_input_nodes[0], delete_user_cb=lambda user: user in values or only_reads(user)
            )
    prepared.recompile()


def _divisors(node: fx.Node) -> Iterator[fx.Node]:
    if node.op not in ("call_function", "call_method"):
        return
    name = op_name(node.target)
    if name in _DIVIDES and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        yield node.args[1]
    elif name in _NOT_OF_ZERO and node.args and isinstance(node.args[0], fx.Node):
        yield node.args[0]
    elif node.target in (operator.pow, torch.pow, "pow") and len(node.args) > 1:
        base, exponent = node.args[:2]
        if isinstance(base, fx.Node) and isinstance(exponent, (int, float)) and exponent < 1:
            yield base


def _only_divides(node: fx.Node) -> bool:
    return any(True for _ in _divisors(node))


def _is_layer(node: Any) -> bool:
    """Whether a node calls a layer, whose kernel rounds its output."""
    return node.op == "call_module" or node.target in (F.linear, F.conv1d, F.conv2d, F.conv3d)


def _passes_on(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node is a rounding, or only moves its input or keeps it away from zero."""
    if node.op == "call_module":
        return isinstance(modules.get(str(node.target)), FakeQuantize)
    if node.op not in ("call_function", "call_method"):
        return False
    name: Any = op_name(node.target)
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    return name in MOVES or (name in _STAYS_AWAY and len(tensors) == 1)
