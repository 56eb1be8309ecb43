"""Inserting fake-quant into a captured graph: placed by upstream's quantizers, with our FakeQuantize and selection.

The quantizers see the graph as the int8 network will have it, without BatchNorms that fold into the layer before. So
their patterns for inference match, whatever kind of layer BatchNorm follows, and upstream's fusion of convolution and
BatchNorm is not needed (it fixes eps and momentum and divides by gamma:
https://github.com/pytorch/ao/blob/main/torchao/quantization/pt2e/qat_utils.py).
"""

from __future__ import annotations

import operator
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn
from torchao.quantization.pt2e.prepare import prepare as upstream_prepare
from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer, SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY, QuantizationAnnotation
from torchao.quantization.pt2e.utils import _get_node_name_to_scope

from qat_lightning.errors import ConfigurationError, NetworkError, TraceError
from qat_lightning.graph.scopes import join, scope_of
from qat_lightning.layers.operators import rows
from qat_lightning.modes.late_writes import late_write, late_write_error
from qat_lightning.modes.pt2e.capture import source_line
from qat_lightning.modes.pt2e.dtypes import leave_other_dtypes
from qat_lightning.modes.pt2e.float_sums import leave_sums_unrounded
from qat_lightning.modes.pt2e.folding import (
    Folded,
    bypass,
    foldable,
    folded_pairs,
    give_biases,
    rename_in_annotations,
    undo_bypass,
)
from qat_lightning.modes.pt2e.own_grids import own_modules, take_over
from qat_lightning.modes.pt2e.quantizers import known_rules, make_quantizer
from qat_lightning.modes.pt2e.retraced import restore, shown_channels_last, tensors_by_identity
from qat_lightning.modes.pt2e.transposed import Shuffled, write_as_convolutions
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe

aten = torch.ops.aten

_CLAMPS = tuple(overload for row in rows("clamp") for overload in row.overloads)


def insert_fake_quantize(
    graph_module: fx.GraphModule, recipe: Recipe, *, prefix: str, name: str
) -> tuple[fx.GraphModule, list[Folded]]:
    """Insert a FakeQuantize wherever the backend's quantizer wants one, in the modules that the recipe selects.

    Args:
        graph_module: A captured network; modified.
        recipe: Backend, scheme and selection.
        prefix: The network's name in the LightningModule, to which the selection is relative.
        name: The network's class, for messages.

    Returns:
        The graph module for upstream's convert, and the layers with a BatchNorm to fold.

    Raises:
        NetworkError: There is nothing to quantize, or the quantizer fails on this graph.
    """
    quantizer = make_quantizer(recipe)
    try:
        with warnings.catch_warnings():
            # "The input of maxpool2d is not quantized": it runs in float then, as the coverage reports.
            warnings.filterwarnings("ignore", message=".*maxpool2d.*")
            graph_module, folded = _annotate(graph_module, quantizer, recipe, prefix)
            scopes = _get_node_name_to_scope(graph_module)
            prepared = upstream_prepare(graph_module, scopes, False, quantizer.prepare_obs_or_fq_callback)
            own_modules(prepared, recipe)
    except ConfigurationError:
        raise
    except (AssertionError, ValueError, RuntimeError, NotImplementedError, AttributeError, KeyError) as error:
        raise NetworkError(
            f"{type(quantizer).__name__} fails on {name}: {type(error).__name__}: {error}. Use exclude= for the part "
            "that fails, or mode='fx' or mode='eager'."
        ) from error
    if not any(isinstance(module, FakeQuantize) for module in prepared.children()):
        raise NetworkError(
            f"There is nothing to quantize in {name} for backend {recipe.backend!r}: "
            f"{known_rules(recipe, quantizer)}, and no selected module has any of these. Check include and exclude, "
            "or use another module=."
        )
    _refuse_late_writes(prepared, name)
    return prepared, folded


def _annotate(
    graph_module: fx.GraphModule, quantizer: Quantizer, recipe: Recipe, prefix: str
) -> tuple[fx.GraphModule, list[Folded]]:
    """Let the quantizer annotate the graph without its BatchNorms, and restore these afterwards."""
    known, own_grids = tensors_by_identity(graph_module), recipe.target.own_grids
    graph_module = quantizer.transform_for_annotation(graph_module)
    if own_grids:
        restore(graph_module, known)
    graph = graph_module.graph
    shuffled: list[Shuffled] = []
    if "subpixel" in recipe.families and recipe.backend == "x86":
        shuffled = write_as_convolutions(graph, lambda node: selects(recipe, prefix, node))
    _separate_weights(graph)
    _name_sources(graph)
    pairs = foldable(graph, shuffled)
    if own_grids:
        give_biases(graph_module, pairs)
    else:
        _leave_float(graph, recipe, prefix)
    taken = bypass(pairs)
    with shown_channels_last(graph) if recipe.target.channels_last else nullcontext():
        quantizer.annotate(graph_module)
    if own_grids:
        take_over(graph, recipe, lambda node: selects(recipe, prefix, node))
    else:
        _amend(quantizer, graph, recipe)
    undo_bypass(pairs, taken)
    if not own_grids:
        _annotate_after_clamp(graph)
    leave_other_dtypes(graph)
    quantizer.validate(graph_module)
    return graph_module, folded_pairs(pairs)


def _amend(quantizer: Quantizer, graph: fx.Graph, recipe: Recipe) -> None:
    """Correct annotations that built-in quantizers miss, or should not make."""
    if "convolutions" in recipe.families:
        _annotate_conv1d(quantizer, graph)
    if "sums" in recipe.families:
        leave_sums_unrounded(graph)


def _annotate_conv1d(quantizer: Any, graph: fx.Graph) -> None:
    """Quantize 1-d convolutions like 2-d ones, for which x86's quantizer also has a rule without ReLU."""
    annotate = getattr(quantizer, "_annotate_conv_node_helper", None)
    if annotate is None:
        return  # XNNPACK's quantizer has its own rule
    for conv in graph.find_nodes(op="call_function", target=aten.conv1d.default):
        if not getattr(conv.meta.get(Q_ANNOTATION_KEY), "_annotated", False):
            annotate(conv, True, quantizer.global_config)


def _refuse_late_writes(prepared: fx.GraphModule, name: str) -> None:
    """Raise a TraceError for a write found by `late_write`; ops' schemas show writes and views."""
    writes: dict[fx.Node, fx.Node] = {}
    memory: dict[fx.Node, fx.Node] = {}
    for node in prepared.graph.nodes:
        memory[node] = node
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema = node.target._schema
        for argument, given in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not isinstance(given, fx.Node):
                continue
            if argument.alias_info.is_write:
                writes[node] = given
            if any(result.alias_info is not None for result in schema.returns):
                memory[node] = memory[given]
    found = late_write(prepared.graph, dict(prepared.named_modules()), writes, memory)
    if found is not None:
        rounded, write = found
        raise TraceError(late_write_error("pt2e", name, rounded.name, f"{write.name!r}{source_line(write)}"))


_SOURCE: dict[Any, Any] = {
    aten.conv1d.default: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.linear.default: nn.Linear,
    aten.relu.default: nn.ReLU,
    aten.hardtanh.default: nn.Hardtanh,
    aten.relu6.default: nn.ReLU6,
    aten.hardswish.default: nn.Hardswish,
    aten.silu.default: nn.SiLU,
    aten.leaky_relu.default: nn.LeakyReLU,
    aten.tanh.default: nn.Tanh,
    aten.gelu.default: nn.GELU,
    aten.adaptive_avg_pool2d.default: nn.AdaptiveAvgPool2d,
    aten.add.Tensor: operator.add,
}
"""The module or function that x86's patterns expect as the source of an op."""


def _name_sources(graph: fx.Graph) -> None:
    """Set the source of each op separately, for the quantizers.

    Export derives it from the network's code. It misses the linear layer inside attention, merges two calls of a
    module, and treats ``conv(x) + 1`` as a sum of two tensors, on which X86InductorQuantizer fails.
    """
    for node in graph.nodes:
        source = _SOURCE.get(node.target, node.target)
        if source is operator.add and (node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args)):
            source = node.target
        if node.op == "call_function":
            node.meta["source_fn_stack"] = [(node.name, source)]
        elif node.op == "get_attr":
            node.meta.pop("source_fn_stack", None)


def _separate_weights(graph: fx.Graph) -> None:
    """Let each call of a layer read its weight separately: XNNPACKQuantizer annotates a weight only once."""
    for weight in graph.find_nodes(op="get_attr"):
        for user in list(weight.users)[1:]:
            with graph.inserting_after(weight):
                own = graph.get_attr(str(weight.target))
            own.meta = dict(weight.meta)
            user.replace_input_with(weight, own)


def _leave_float(graph: fx.Graph, recipe: Recipe, prefix: str) -> None:
    """Mark ops that the recipe does not select as annotated without quantization, so that quantizers skip them."""
    empty: type[QuantizationAnnotation] = QuantizationAnnotation
    if recipe.backend != "xnnpack":
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import _X86InductorQuantizationAnnotation

        empty = _X86InductorQuantizationAnnotation
    for node in graph.nodes:
        if node.op == "call_function" and not selects(recipe, prefix, node):
            node.meta[Q_ANNOTATION_KEY] = empty(_annotated=True)


def selects(recipe: Recipe, prefix: str, node: fx.Node) -> bool:
    """Whether the module that calls this op is to be quantized."""
    name = join(prefix, scope_of(node))
    return recipe.selects(name) if name else not recipe.include


def _annotate_after_clamp(graph: fx.Graph) -> None:
    """Observe only after a ReLU6: the range there gives the finer grid, whose end then acts as the clamp."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _CLAMPS or not _starts_at_zero(node):
            continue
        source, annotation = node.args[0], node.meta.get(Q_ANNOTATION_KEY)
        if annotation is None or not isinstance(annotation.output_qspec, SharedQuantizationSpec):
            continue
        before = source.meta.get(Q_ANNOTATION_KEY)
        if annotation.output_qspec.edge_or_node is not source or before is None or len(source.users) > 1:
            continue
        if not isinstance(before.output_qspec, QuantizationSpec):
            continue
        annotation.output_qspec, before.output_qspec = before.output_qspec, None
        annotation.input_qspec_map = {}
        rename_in_annotations(graph, source, node, of_users=False)


def _starts_at_zero(node: fx.Node) -> bool:
    if node.target is aten.relu6.default:
        return True
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", node.kwargs.get("min", -1.0))
    return isinstance(low, (int, float)) and low == 0
