"""Coverage of mode pt2e: which layers became int8, and why others did not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_lightning.graph.scopes import join, scope_of
from qat_lightning.layers.operators import WEIGHTED, module_types
from qat_lightning.modes.decomposed.ops import CHANNEL_AXIS, DEQUANTIZE
from qat_lightning.modes.prepared import PreparedState
from qat_lightning.modes.protocol import EXCLUDED, LayerCoverage
from qat_lightning.modes.pt2e.annotate import selects
from qat_lightning.modes.pt2e.convert import Decomposed
from qat_lightning.modes.pt2e.coverage import IN_BRANCH
from qat_lightning.modes.pt2e.dtypes import other_dtype
from qat_lightning.modes.pt2e.network import ExportedNetwork
from qat_lightning.modes.pt2e.training import Plan

_WEIGHTED = tuple(kind for kind in WEIGHTED if kind not in module_types("attention"))
"""Attention is exported as products and a linear layer, which has a row."""


def coverage(state: PreparedState, prepared: ExportedNetwork, result: Decomposed | None) -> list[LayerCoverage]:
    """Whether each layer with a weight became int8 (or is going to, without a result), and why not."""
    plan: Plan = state.plan
    unseen = [] if result is None else result.unseen
    tensors = {id(parameter): name for name, parameter in prepared.named_parameters(remove_duplicate=True)}
    converted = {} if result is None else {node.name: node for node in result.graph_module.graph.nodes}
    users: dict[str, list[fx.Node]] = {}
    for node in plan.graph.nodes:
        for name in _weights_of(node, plan, prepared, tensors):
            users.setdefault(name, []).append(node)
    rows = []
    for name, module in state.float_network.named_modules():
        if not isinstance(module, _WEIGHTED):
            continue
        weight = tensors.get(id(_weight(_submodule(prepared, name))), "")
        calls = users.get(weight, [])
        own = [node for node in plan.graph.nodes if node.target in CHANNEL_AXIS and scope_of(node) == name]
        if not any(node.target in CHANNEL_AXIS for node in calls) and own:
            calls = own  # its weight is computed, as in a standardized convolution
        # Other readers of its weight, such as a penalty, have rows of their own.
        calls = [node for node in calls if node.target in CHANNEL_AXIS] or calls
        floats = [
            node
            for node in calls
            if not (node.name in plan.weights if result is None else _is_int8(converted.get(node.name), node))
        ]
        reason = "" if calls and not floats else _why_float(state, name, floats, unseen)
        rows.append(LayerCoverage(name, type(module).__name__, not reason, reason))
    return rows


def _weight(module: nn.Module | None) -> Tensor | None:
    """A layer's weight; for a recurrent layer, the first weight of its first layer."""
    names = ("weight", "weight_ih_l0", "weight_ih")
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), Tensor)), None)


def _submodule(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def _weights_of(node: fx.Node, plan: Plan, prepared: nn.Module, tensors: dict[int, str]) -> list[str]:
    """The parameters that an op reads directly or through FakeQuantize."""
    if node.op != "call_function":
        return []
    names = []
    for source in node.all_input_nodes:
        while source.op == "call_module":
            source = source.all_input_nodes[0]
        if source.op == "get_attr":
            holder, _, leaf = str(source.target).rpartition(".")
            name = tensors.get(id(getattr(prepared.get_submodule(holder), leaf)))
            names += [name] if name else []
    return names


def _is_int8(node: fx.Node | None, planned: fx.Node) -> bool:
    """Whether an op of the decomposed graph reads integers, where its quantizer planned that."""
    if node is None or node.target not in CHANNEL_AXIS:
        return False
    input_planned, weight_planned = (_is_rounded(arg) for arg in planned.args[:2])
    input_is, weight_is = (isinstance(arg, fx.Node) and arg.target in DEQUANTIZE for arg in node.args[:2])
    return weight_planned and weight_is and (input_is or not input_planned)


def _is_rounded(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module"


def _why_float(state: PreparedState, name: str, floats: list[fx.Node], unseen: list[str]) -> str:
    if not state.recipe.selects(join(state.prefix, name)):
        return EXCLUDED
    if not floats:
        return "not used by forward"
    node = floats[0]
    if not selects(state.recipe, state.prefix, node):
        return EXCLUDED
    if node.target is torch.ops.higher_order.cond:
        return IN_BRANCH
    if node.name in state.plan.weights and unseen:
        return "no finite range was observed for its input"
    if dtype := other_dtype(node):
        return f"one of its tensors is {dtype}, and only float32 can be on an int8 grid"
    return f"the quantizer of backend {state.recipe.backend!r} has no rule for {node.target} in this place"
