"""BatchNorm that folds into the layer before it: hidden from the quantizer, and restored afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e.quantizer import DerivedQuantizationSpec, SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY, QuantizationAnnotation

from qat_lightning.modes.decomposed.ops import CHANNEL_AXIS
from qat_lightning.modes.pt2e.transposed import Shuffled

aten = torch.ops.aten


@dataclass(frozen=True)
class Folded:
    """A layer and the BatchNorm that will be folded into it, by the names of their nodes.

    Attributes:
        layer: The layer.
        batchnorm: The BatchNorm.
        moves: Ops that move the layer's outputs to their places before BatchNorm reads them, in order.
    """

    layer: str
    batchnorm: str
    moves: tuple[str, ...] = ()


def foldable(graph: fx.Graph, shuffled: list[Shuffled]) -> list[tuple[Shuffled, fx.Node]]:
    """Layers whose output is read only by a BatchNorm with running statistics."""
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
        # Linear has channels last, but BatchNorm normalizes dimension 1, also for one sample without a batch; a grouped
        # transposed
        # convolution has fewer weight rows than channels.
        if layer.meta["val"].dim() != len(shape):
            continue
        if not shape or shape[CHANNEL_AXIS[layer.target]] != channels * found.phases:
            continue
        pairs.append((found, batchnorm))
    return pairs


def give_biases(graph_module: fx.GraphModule, pairs: list[tuple[Shuffled, fx.Node]]) -> None:
    """Give layers without a bias a zero bias if a BatchNorm folds into them, for the quantizer to annotate.

    Folding a BatchNorm leaves a bias in every layer, which a runtime may need on a grid as well.
    """
    for found, batchnorm in pairs:
        layer = found.convolution
        if len(layer.args) > 2 and layer.args[2] is not None:
            continue
        weight: Any = layer.args[1]
        channels = int(batchnorm.args[3].meta["val"].shape[0]) * found.phases  # type: ignore[union-attr]
        name = f"{layer.name}_zero_bias"
        while hasattr(graph_module, name):
            name += "_"
        graph_module.register_buffer(name, torch.zeros(channels), persistent=False)
        with layer.graph.inserting_before(layer):
            bias = layer.graph.get_attr(name)
        bias.meta = {key: value for key, value in weight.meta.items() if key != "source_fn_stack"}
        with weight.meta["val"].fake_mode:
            bias.meta["val"] = torch.zeros(channels)
        layer.args = (*layer.args[:2], bias, *layer.args[3:])


def folded_pairs(pairs: list[tuple[Shuffled, fx.Node]]) -> list[Folded]:
    """The names of nodes found by `foldable`, after the quantizer has added its nodes."""
    return [
        Folded(found.convolution.name, batchnorm.name, tuple(move.name for move in found.moves))
        for found, batchnorm in pairs
    ]


def bypass(pairs: list[tuple[Shuffled, fx.Node]]) -> list[tuple[Any, ...]]:
    """Connect each layer to the readers of its BatchNorm, which is thus hidden from the quantizer.

    Returns:
        State for `undo_bypass`: the arguments of each BatchNorm, and the node before it.
    """
    taken = []
    for found, batchnorm in pairs:
        taken.append((batchnorm.args, batchnorm.prev))
        batchnorm.args = ()
        batchnorm.replace_all_uses_with(found.last)
        batchnorm._remove_from_list()
        batchnorm.graph._find_nodes_lookup_table.remove(batchnorm)
    return taken


def undo_bypass(pairs: list[tuple[Shuffled, fx.Node]], taken: list[tuple[Any, ...]]) -> None:
    """Restore BatchNorm, and move annotations of the layer's output to BatchNorm's."""
    for (found, batchnorm), (args, before) in reversed(list(zip(pairs, taken, strict=True))):
        last = found.last
        before.append(batchnorm)
        batchnorm.graph._find_nodes_lookup_table.insert(batchnorm)
        last.replace_all_uses_with(batchnorm)
        batchnorm.args = args
        annotation = last.meta.get(Q_ANNOTATION_KEY)
        if annotation is not None and annotation.output_qspec is not None:
            batchnorm.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                output_qspec=annotation.output_qspec, _annotated=True
            )
            annotation.output_qspec = None
        rename_in_annotations(last.graph, last, batchnorm)


def rename_in_annotations(graph: fx.Graph, old: fx.Node, new: fx.Node, *, of_users: bool = True) -> None:
    """Make annotations that refer to the output of ``old`` refer to that of ``new``."""

    def moved(where: Any) -> Any:
        if where is old:
            return new
        if of_users and isinstance(where, tuple) and where[0] is old and where[1] is not new:
            return (new, where[1])
        return where

    def renamed(spec: Any) -> Any:
        if isinstance(spec, SharedQuantizationSpec):
            return SharedQuantizationSpec(moved(spec.edge_or_node))
        if isinstance(spec, DerivedQuantizationSpec):
            return replace(spec, derived_from=[moved(where) for where in spec.derived_from])
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
