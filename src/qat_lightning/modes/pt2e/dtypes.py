"""Which tensors of a captured graph can be on an int8 grid: those in float32, but not integers, masks or spectra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e.quantizer import DerivedQuantizationSpec, SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

_OTHER = "qat_lightning_other_dtype"


def leave_other_dtypes(graph: fx.Graph) -> None:
    """Remove the annotation of every op that would read or write a tensor on a grid that is not float32.

    Upstream's quantizers only check the kind of an op, and annotate a sum of integers or a concatenation of spectra
    like any other. Such an op stays float entirely, because no kernel has one operand on a grid and one off it.
    Annotations that share a range with one of its tensors are removed as well.

    Args:
        graph: Annotated by a quantizer; each node knows the dtype of its value.
    """
    left = {node for node in graph.nodes if _is_annotated(node) and not _all_float(node)}
    for node in left:
        node.meta[_OTHER] = next(_dtype(tensor) for tensor in [*node.all_input_nodes, node] if not _is_float(tensor))
    _take_all_back(graph, left)


def leave_unselected(graph: fx.Graph, selects: Callable[[fx.Node], bool]) -> None:
    """Remove the annotation of every op that is not to be quantized, and of tensors that share or derive its range.

    Args:
        graph: Annotated by a quantizer.
        selects: Whether the code that created a node is to be quantized.
    """
    _take_all_back(graph, {node for node in graph.nodes if node.op == "call_function" and not selects(node)})


def _take_all_back(graph: fx.Graph, left: set[fx.Node]) -> None:
    left = {node for node in left if _is_annotated(node)}
    while left:
        for node in left:
            _take_back(node)
        left = {node for node in graph.nodes if _is_annotated(node) and _depends_on_nothing(node)}


def _is_annotated(node: fx.Node) -> bool:
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and bool(annotation.input_qspec_map or annotation.output_qspec is not None)


def _all_float(node: fx.Node) -> bool:
    annotation = node.meta[Q_ANNOTATION_KEY]
    tensors = [source for source, spec in annotation.input_qspec_map.items() if spec is not None]
    if annotation.output_qspec is not None:
        tensors.append(node)
    return all(_is_float(tensor) for tensor in tensors)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.dtype is torch.float32


def other_dtype(node: fx.Node) -> str:
    """The dtype of the tensor for which `leave_other_dtypes` left an op float; empty if it did not."""
    return str(node.meta.get(_OTHER, ""))


def _dtype(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _take_back(node: fx.Node) -> None:
    annotation = node.meta[Q_ANNOTATION_KEY]
    annotation.input_qspec_map = {}
    annotation.output_qspec = None
    if hasattr(annotation, "_is_output_of_quantized_pattern"):
        annotation._is_output_of_quantized_pattern = False


def _depends_on_nothing(node: fx.Node) -> bool:
    """Whether an annotation refers to the range of a tensor that no longer has one."""
    annotation = node.meta[Q_ANNOTATION_KEY]
    return any(
        _spec_at(where) is None
        for spec in [*annotation.input_qspec_map.values(), annotation.output_qspec]
        for where in _wanted(spec)
    )


def _wanted(spec: Any) -> list[Any]:
    if isinstance(spec, SharedQuantizationSpec):
        return [spec.edge_or_node]
    return list(spec.derived_from) if isinstance(spec, DerivedQuantizationSpec) else []


def _spec_at(where: Any) -> Any:
    source, user = where if isinstance(where, tuple) else (None, where)
    annotation = user.meta.get(Q_ANNOTATION_KEY)
    if annotation is None:
        return None
    return annotation.output_qspec if source is None else annotation.input_qspec_map.get(source)
