"""Sums that only a softmax or normalization reads are not rounded in mode fx, because these are float in every backend.

Rounding them gains nothing and can lose all accuracy. Transformers add a mask of minus 3e38 to their scores: on a grid
with that range all scores are equal, and attention is the mean of the unmasked values. And the inputs of BERT's
normalizations have single values that are a hundred times larger than the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from qat_lightning.layers.operators import MOVES
from qat_lightning.modes.float_sums import FLOAT_READERS, SUMS
from qat_lightning.modes.fx.divisors import leave_unrounded
from qat_lightning.modes.places import op_name
from qat_lightning.numerics.fake_quantize import FakeQuantize

_MODULES = (nn.Softmax, nn.LogSoftmax, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_SUMS = SUMS | {"clamp"}
_MOVES = MOVES | {"type"}
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "linear", "conv1d", "conv2d", "conv3d"})


def leave_sums_unrounded(prepared: fx.GraphModule) -> set[fx.Node]:
    """Do not round sums that only float ops read, nor masks in them; outputs of layers and products stay rounded.

    Args:
        prepared: The result of upstream's prepare; changed in place. Ranges stay, because checkpoints of earlier
            releases contain them.

    Returns:
        The nodes that are not rounded.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    computed = _computed(prepared.graph, modules)
    found = set[fx.Node]()
    for node in reversed(prepared.graph.nodes):
        if not node.users or not all(user in found or _is_float(user, modules) for user in node.users):
            continue
        if _is_rounding(node, modules):
            if _is_sum(_moved(node.args[0], modules)) or node.args[0] not in computed:
                found.add(node)
        elif _is_sum(node) or _moves(node):
            found.add(node)
    leave_unrounded(prepared, found, lambda user: _is_float(user, modules))
    return found


def _computed(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """Outputs of layers and products, and all values computed from them; masks are not among them."""
    found = set[fx.Node]()
    for node in graph.nodes:
        made = any(arg in found for arg in node.all_input_nodes)
        layer = node.op == "call_module" and not _is_rounding(node, modules)
        product = node.op in ("call_function", "call_method") and op_name(node.target) in _PRODUCTS
        if made or layer or product:
            found.add(node)
    return found


def _is_float(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules.get(str(node.target)), _MODULES)
    return node.op in ("call_function", "call_method") and op_name(node.target) in FLOAT_READERS


def _is_rounding(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), FakeQuantize)


def _is_sum(node: Any) -> bool:
    return node.op in ("call_function", "call_method") and op_name(node.target) in _SUMS


def _moves(node: Any) -> bool:
    return node.op in ("call_function", "call_method") and op_name(node.target) in _MOVES


def _moved(node: Any, modules: Mapping[str, nn.Module]) -> Any:
    """The node that computed a value which was only moved and rounded since."""
    while (_moves(node) or _is_rounding(node, modules)) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
