"""Coverage of ops in a captured network: int8 are those that the quantizer annotated and whose ranges are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import scope_of
from qat_lightning.layers.operators import MOVES
from qat_lightning.modes.coverage import Operations, flops_of, is_float, macs_of, operations_of
from qat_lightning.modes.decomposed.ops import CHANNEL_AXIS
from qat_lightning.modes.places import op_name, rounding_of
from qat_lightning.modes.prepared import PreparedState
from qat_lightning.modes.protocol import EXCLUDED, LayerCoverage
from qat_lightning.modes.pt2e.annotate import selects
from qat_lightning.modes.pt2e.dtypes import other_dtype
from qat_lightning.modes.pt2e.network import ExportedNetwork
from qat_lightning.modes.pt2e.training import Plan
from qat_lightning.modes.recording import run_of

aten = torch.ops.aten

IN_BRANCH = "in a branch of torch.cond, which the quantizer does not process"


def pt2e_operations(
    state: PreparedState,
    prepared: ExportedNetwork,
    example: Example,
    layers: set[str],
    values: Mapping[str, Any] | None = None,
    unseen: Sequence[str] = (),
) -> Operations:
    """One row for each op that computes and is not a layer.

    Args:
        state: State of the prepared network.
        prepared: On the CPU, in evaluation.
        example: One call.
        layers: The names of the layers, which have rows of their own.
        values: Values of the nodes of its graph in a call; None to run it.
        unseen: Names of nodes whose range was never observed.
    """
    plan: Plan = state.plan
    names = list(state.float_network.named_modules(remove_duplicate=False))
    shared = {id(module) for name, module in names if name in layers}
    layers = {name for name, module in names if id(module) in shared}  # under any of its names
    if values is None:
        values = run_of(prepared, prepared.graph, plan.spec.flatten(example.args, example.kwargs))
    folded = {pair.batchnorm: pair.layer for pair in plan.folded}
    rows: list[tuple[fx.Node, LayerCoverage]] = []
    for node in plan.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is torch.ops.higher_order.cond:
            rows += [(node, row) for row in _branches(prepared, node)]
        elif _computes(node, values, layers):
            quantized = folded[node.name] in plan.weights if node.name in folded else _is_annotated(node)
            lost = quantized and _lost(prepared, node, unseen)
            reason = "" if quantized and not lost else _why(state, node, lost=lost)
            macs = macs_of(flops_of(node, values, prepared), example)
            row = LayerCoverage(_name(node), op_name(node.target), not reason, reason, what="op", macs=macs)
            rows.append((node, row))
    return operations_of(plan.graph, rows)


def _computes(node: fx.Node, values: Mapping[str, Any], layers: set[str]) -> bool:
    value = values.get(node.name, node.meta.get("val"))
    if not is_float(value) or op_name(node.target).strip("_") in MOVES or "num_batches_tracked" in str(node.args[:1]):
        return False
    return scope_of(node) not in layers


def _name(node: fx.Node) -> str:
    scope = scope_of(node)
    return f"{scope}.{node.name}" if scope else node.name


def _is_annotated(node: fx.Node) -> bool:
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    if annotation is None:
        return False
    output = getattr(annotation, "_is_output_of_quantized_pattern", False)
    return bool(annotation.input_qspec_map or annotation.output_qspec is not None or output)


def _lost(prepared: nn.Module, node: fx.Node, unseen: Sequence[str]) -> bool:
    """Whether a range that the op needs was never observed."""
    for source in node.all_input_nodes:
        if source.op == "call_module" and rounding_of(prepared.get_submodule(str(source.target))) is not None:
            source = source.all_input_nodes[0]
        if source.name in unseen:
            return True
    return False


def _why(state: PreparedState, node: fx.Node, *, lost: bool) -> str:
    if not selects(state.recipe, state.prefix, node):
        return EXCLUDED
    if lost:
        return "no finite range was observed for its input"
    if node.target is aten.batch_norm.default:
        return "a BatchNorm that does not directly follow a single layer cannot be folded"
    if dtype := other_dtype(node):
        return f"one of its tensors is {dtype}, and only float32 can be on an int8 grid"
    return f"the quantizer of backend {state.recipe.backend!r} has no rule for {node.target} in this place"


def _branches(prepared: nn.Module, node: fx.Node) -> Iterator[LayerCoverage]:
    for argument in node.all_input_nodes:
        if argument.op != "get_attr":
            continue
        branch = getattr(prepared, str(argument.target), None)
        graph = getattr(branch, "graph", None)
        for inner in graph.nodes if isinstance(graph, fx.Graph) else ():
            if inner.op == "call_function" and isinstance(inner.meta.get("val"), Tensor):
                name = f"{argument.target}.{inner.name}"
                if op_name(inner.target) not in MOVES and inner.target not in CHANNEL_AXIS:
                    yield LayerCoverage(name, op_name(inner.target), False, IN_BRANCH, what="op")
