"""Where fake-quant goes in a captured graph: upstream's quantizers decide, with our FakeQuantize and our selection.

The quantizers see the graph as the int8 network will have it, without the BatchNorm that folds into the layer before
it. So the patterns they know for inference hold, whatever kind of layer BatchNorm follows, and upstream's fusion of
convolution and BatchNorm is not needed (it fixes eps and momentum and divides by gamma:
https://github.com/pytorch/ao/blob/main/torchao/quantization/pt2e/qat_utils.py).
"""

from __future__ import annotations

import functools
import operator
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torchao.quantization.pt2e.prepare import prepare as upstream_prepare
from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer, SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY, QuantizationAnnotation
from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig
from torchao.quantization.pt2e.utils import _get_node_name_to_scope

from qat_lightning.errors import NetworkError, TraceError
from qat_lightning.graph.scopes import join, scope_of
from qat_lightning.layers.operators import OPERATORS, rows
from qat_lightning.modes.late_writes import late_write, late_write_error
from qat_lightning.modes.pt2e.capture import source_line
from qat_lightning.modes.pt2e.dtypes import leave_other_dtypes
from qat_lightning.modes.pt2e.float_sums import leave_sums_unrounded
from qat_lightning.modes.pt2e.transposed import Shuffled, write_as_convolutions
from qat_lightning.modes.qconfig import activation_qscheme, activation_settings, weight_qscheme, weight_settings
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe

aten = torch.ops.aten

CHANNEL_AXIS: dict[Any, int] = {
    overload: row.channel_axis for row in OPERATORS if row.channel_axis is not None for overload in row.overloads
}
"""The ops with a weight, and the dimension of that weight that counts output channels."""

_CLAMPS = tuple(overload for row in rows("clamp") for overload in row.overloads)


@dataclass(frozen=True)
class Folded:
    """A layer and the BatchNorm that will be folded into it, by the names of their nodes.

    Attributes:
        layer: The layer.
        batchnorm: The BatchNorm.
        moves: What brings the layer's outputs to their places before BatchNorm reads them, in order.
    """

    layer: str
    batchnorm: str
    moves: tuple[str, ...] = ()


def make_quantizer(recipe: Recipe) -> Quantizer:
    """The quantizer of the recipe's backend, set to the recipe's scheme."""
    if recipe.backend == "xnnpack":
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

        xnnpack = XNNPACKQuantizer()
        # The patterns with BatchNorm never match here, and to build them is an export each.
        xnnpack.SUPPORTED_PATTERNS = [p for p in xnnpack.SUPPORTED_PATTERNS if "_bn" not in p.name]
        xnnpack.set_global(make_config(recipe))
        return xnnpack
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    # Also for TensorRT, whose kernels as well take a residual add and an activation with a convolution.
    return X86InductorQuantizer().set_global(make_config(recipe))


def make_config(recipe: Recipe) -> QuantizationConfig:
    """The recipe as upstream's quantizers want it, with our FakeQuantize."""
    scheme = recipe.scheme
    activation_low, activation_high = recipe.activation_limits
    weight_low, weight_high = recipe.weight_limits
    activation = QuantizationSpec(
        dtype=recipe.target.activation_dtype,
        quant_min=activation_low,
        quant_max=activation_high,
        qscheme=activation_qscheme(recipe),
        observer_or_fake_quant_ctr=_Constructor("FakeQuantize", **activation_settings(recipe)),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=weight_low,
        quant_max=weight_high,
        # The quantizers refuse affine weights, which are simulated only and never reach their converter.
        qscheme=torch.per_channel_symmetric if scheme.per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if scheme.per_channel else None,
        observer_or_fake_quant_ctr=_Constructor(
            "PerChannelFakeQuantize" if scheme.per_channel else "FakeQuantize",
            qscheme=weight_qscheme(scheme),
            **weight_settings(recipe),
        ),
    )
    # Not is_qat: that asks for the patterns with BatchNorm, which is not there when the quantizer looks.
    return QuantizationConfig(activation, activation, weight, None, is_qat=False)


class _Constructor:
    """Makes a FakeQuantize from a QuantizationSpec, as upstream's ``Observer.with_args`` does.

    Upstream passes ``ch_axis`` only to what has "PerChannel" in its name.
    """

    def __init__(self, name: str, **fixed: Any) -> None:
        self.__name__ = name
        self.fixed = fixed

    def with_args(self, **given: Any) -> functools.partial[FakeQuantize]:
        return functools.partial(FakeQuantize, **(given | self.fixed))


def insert_fake_quantize(
    graph_module: fx.GraphModule, recipe: Recipe, *, prefix: str, name: str
) -> tuple[fx.GraphModule, list[Folded]]:
    """Put a FakeQuantize wherever the backend's quantizer wants one, in the modules that the recipe selects.

    Args:
        graph_module: A captured network; it is used up.
        recipe: Backend, scheme and selection.
        prefix: The network's name in the LightningModule, to which the selection is relative.
        name: The network's class, for messages.

    Returns:
        The graph module that upstream's convert takes, and which layers have a BatchNorm to fold.

    Raises:
        NetworkError: There is nothing to quantize, or the quantizer fails on this graph.
    """
    quantizer = make_quantizer(recipe)
    scopes = _get_node_name_to_scope(graph_module)
    try:
        with warnings.catch_warnings():
            # "The input of maxpool2d is not quantized": then it runs in float, as the coverage says.
            warnings.filterwarnings("ignore", message=".*maxpool2d.*")
            graph_module = quantizer.transform_for_annotation(graph_module)
            shuffled: list[Shuffled] = []
            if "subpixel" in recipe.families and recipe.backend == "x86":
                shuffled = write_as_convolutions(graph_module.graph, lambda node: selects(recipe, prefix, node))
            _separate_weights(graph_module.graph)
            _name_sources(graph_module.graph)
            pairs = _foldable(graph_module.graph, shuffled)
            _leave_float(graph_module.graph, recipe, prefix)
            arguments = _bypass(pairs)
            quantizer.annotate(graph_module)
            if "convolutions" in recipe.families:
                _annotate_conv1d(quantizer, graph_module.graph)
            if "sums" in recipe.families:
                leave_sums_unrounded(graph_module.graph)
            _undo_bypass(pairs, arguments)
            _annotate_after_clamp(graph_module.graph)
            leave_other_dtypes(graph_module.graph)
            quantizer.validate(graph_module)
            folded = _folded(pairs)
            prepared = upstream_prepare(graph_module, scopes, is_qat=False)
    except (AssertionError, ValueError, RuntimeError, NotImplementedError, AttributeError, KeyError) as error:
        raise NetworkError(
            f"{type(quantizer).__name__} fails on {name}: {type(error).__name__}: {error}. Use exclude= for the part "
            "at fault, or mode='fx' or mode='eager'."
        ) from error
    if not any(isinstance(module, FakeQuantize) for module in prepared.children()):
        raise NetworkError(
            f"There is nothing to quantize in {name} for backend {recipe.backend!r}: {type(quantizer).__name__} knows "
            f"{_KNOWN[recipe.backend]}, and of these no selected module has any. Look at include and exclude, or give "
            "another module=."
        )
    _refuse_late_writes(prepared, name)
    return prepared, folded


def _annotate_conv1d(quantizer: Any, graph: fx.Graph) -> None:
    """Quantize convolutions of sequences as those of images, for which x86's quantizer has a rule without ReLU too."""
    annotate = getattr(quantizer, "_annotate_conv_node_helper", None)
    if annotate is None:
        return  # XNNPACK's has one of its own
    for conv in graph.find_nodes(op="call_function", target=aten.conv1d.default):
        if not getattr(conv.meta.get(Q_ANNOTATION_KEY), "_annotated", False):
            annotate(conv, True, quantizer.global_config)


def _refuse_late_writes(prepared: fx.GraphModule, name: str) -> None:
    """Raise a TraceError for what `late_write` finds; each op's schema says what it writes to, and what is a view."""
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


_KNOWN_TO_X86 = "Conv1d, Conv2d, {}Linear, products of equal shapes, and pooling, cat and flatten between them"
_KNOWN = {
    "x86": _KNOWN_TO_X86.format("ConvTranspose1d, ConvTranspose2d, "),
    "tensorrt": _KNOWN_TO_X86.format(""),
    "xnnpack": "Conv1d, Conv2d, ConvTranspose, Linear, add, mul, cat, adaptive_avg_pool2d and reshaping between them",
}
"""What each quantizer has rules for, in words."""


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
"""What x86's patterns are written in: the module or function that an op comes from."""


def _name_sources(graph: fx.Graph) -> None:
    """Tell the quantizers where each op comes from, one by one.

    Export notes it from the network's code, and misses the linear layer inside attention, takes two calls of a module
    for one, and calls ``conv(x) + 1`` a sum of two tensors, on which X86InductorQuantizer fails.
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
    """Let each call of a layer read its weight by itself: XNNPACKQuantizer annotates a weight once."""
    for weight in graph.find_nodes(op="get_attr"):
        for user in list(weight.users)[1:]:
            with graph.inserting_after(weight):
                own = graph.get_attr(str(weight.target))
            own.meta = dict(weight.meta)
            user.replace_input_with(weight, own)


def _leave_float(graph: fx.Graph, recipe: Recipe, prefix: str) -> None:
    """Mark what the recipe does not select as annotated with nothing, which both quantizers then leave alone."""
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


def _foldable(graph: fx.Graph, shuffled: list[Shuffled]) -> list[tuple[Shuffled, fx.Node]]:
    """Layers whose output goes to one BatchNorm with running statistics, and nowhere else."""
    by_last = {one.last: one for one in shuffled}
    pairs = []
    for batchnorm in graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        source, mean = batchnorm.args[0], batchnorm.args[3]
        if not isinstance(source, fx.Node) or mean is None or len(source.users) > 1:
            continue
        found = by_last.get(source, Shuffled(source, (), 1))
        layer = found.convolution
        if layer.target not in CHANNEL_AXIS:
            continue
        weight = layer.args[1]
        shape = weight.meta["val"].shape if isinstance(weight, fx.Node) else ()
        channels = batchnorm.args[3].meta["val"].shape[0]
        # Linear puts channels last and BatchNorm normalizes dimension 1, as it does of one sample without a batch; a
        # grouped transposed convolution has fewer rows than channels.
        if layer.meta["val"].dim() != len(shape):
            continue
        if not shape or shape[CHANNEL_AXIS[layer.target]] != channels * found.phases:
            continue
        pairs.append((found, batchnorm))
    return pairs


def _folded(pairs: list[tuple[Shuffled, fx.Node]]) -> list[Folded]:
    return [
        Folded(found.convolution.name, batchnorm.name, tuple(move.name for move in found.moves))
        for found, batchnorm in pairs
    ]


def _bypass(pairs: list[tuple[Shuffled, fx.Node]]) -> list[tuple[Any, ...]]:
    """Connect each layer to what follows its BatchNorm, for as long as the quantizer looks."""
    arguments = []
    for found, batchnorm in pairs:
        arguments.append(batchnorm.args)
        batchnorm.args = (None, *batchnorm.args[1:])
        batchnorm.replace_all_uses_with(found.last)
    return arguments


def _undo_bypass(pairs: list[tuple[Shuffled, fx.Node]], arguments: list[tuple[Any, ...]]) -> None:
    """Put BatchNorm back, and move what was annotated for the layer's output to BatchNorm's."""
    for (found, batchnorm), args in zip(pairs, arguments, strict=True):
        last = found.last
        last.replace_all_uses_with(batchnorm)
        batchnorm.args = args
        annotation = last.meta.get(Q_ANNOTATION_KEY)
        if annotation is not None and annotation.output_qspec is not None:
            batchnorm.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                output_qspec=annotation.output_qspec, _annotated=True
            )
            annotation.output_qspec = None
        _rename_in_annotations(last.graph, last, batchnorm)


def _annotate_after_clamp(graph: fx.Graph) -> None:
    """Observe only after a ReLU6: its range is the finer grid, and the clamp is then what the grid ends at."""
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
        _rename_in_annotations(graph, source, node, of_users=False)


def _starts_at_zero(node: fx.Node) -> bool:
    if node.target is aten.relu6.default:
        return True
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", node.kwargs.get("min", -1.0))
    return isinstance(low, (int, float)) and low == 0


def _rename_in_annotations(graph: fx.Graph, old: fx.Node, new: fx.Node, *, of_users: bool = True) -> None:
    """Make annotations that speak of the output of ``old`` speak of that of ``new``."""

    def renamed(spec: Any) -> Any:
        if not isinstance(spec, SharedQuantizationSpec):
            return spec
        where = spec.edge_or_node
        if where is old:
            return SharedQuantizationSpec(new)
        if of_users and isinstance(where, tuple) and where[0] is old and where[1] is not new:
            return SharedQuantizationSpec((new, where[1]))
        return spec

    for node in graph.nodes:
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is None or node is new:
            continue
        annotation.output_qspec = renamed(annotation.output_qspec)
        annotation.input_qspec_map = {
            (new if of_users and source is old else source): renamed(spec)
            for source, spec in annotation.input_qspec_map.items()
        }
