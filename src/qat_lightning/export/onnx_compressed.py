"""Compressed weights and dynamic linear layers in ONNX, in forms for which runtimes have kernels.

A matrix product with a compressed weight becomes ``MatMulNBits``, a contrib op of ONNX Runtime that OpenVINO also
reads. The file then says itself that activations stay float; ONNX Runtime computes a DequantizeLinear before a MatMul
with activations rounded to 8 bits by default. All other ops read a DequantizeLinear of int8 or int4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qat_lightning.export.onnx_rewrites import _array, _constant, _node, _replace

_DOMAIN, _WEIGHT = "qat_lightning", "Weight"
_MICROSOFT = "com.microsoft"
_BLOCKS = (16, 32, 64, 128, 256)
"""Group sizes that MatMulNBits supports."""


def translations() -> dict[Any, Callable[..., Any]]:
    """Return translations of the ops of `qat_lightning.export.marked` for `torch.onnx.export`."""
    import onnxscript
    from onnxscript import opset20 as op

    marker = onnxscript.values.Op(onnxscript.values.Opset(_DOMAIN, 1), _WEIGHT, _schema())

    def weight(stored, scales, zero_points, shape: Sequence[int], transposed: int, low: int, high: int, group: int):  # type: ignore[no-untyped-def]
        limits = {"low": low, "high": high, "group": group}
        return marker(stored, scales, zero_points, shape=shape, transposed=transposed, **limits)

    def dynamic_linear(input, columns, scales, bias):  # type: ignore[no-untyped-def]
        integers, scale, zero_point = op.DynamicQuantizeLinear(input)
        product = op.Cast(op.MatMulInteger(integers, columns, zero_point), to=onnxscript.FLOAT.dtype)
        output = op.Mul(product, op.Mul(scale, scales))
        return output if bias is None else op.Add(output, bias)

    weight.__annotations__.update(shape=Sequence[int], transposed=int, low=int, high=int, group=int)
    ops = torch.ops.qat_lightning
    return {ops.weight.default: weight, ops.dynamic_linear.default: dynamic_linear}


def _schema() -> Any:
    """Return the schema of the temporary op that represents a weight until `compress`."""
    from onnx.defs import OpSchema

    parameter, attribute = OpSchema.FormalParameter, OpSchema.Attribute
    optional = OpSchema.FormalParameterOption.Optional
    return OpSchema(
        _WEIGHT,
        _DOMAIN,
        1,
        inputs=[
            parameter("stored", "T"),
            parameter("scales", "tensor(float)"),
            parameter("zero_points", "tensor(int8)", param_option=optional),
        ],
        outputs=[parameter("weight", "tensor(float)")],
        type_constraints=[("T", ["tensor(int8)", "tensor(uint8)"], "What a byte holds.")],
        attributes=[
            attribute("shape", OpSchema.AttrType.INTS, required=True),
            *(attribute(name, OpSchema.AttrType.INT, required=True) for name in ("transposed", "low", "high", "group")),
        ],
    )


def compress(model: Any) -> None:
    """Replace each marked weight by a form that runtimes support.

    Args:
        model: An ``onnx_ir.Model``, changed in place.
    """
    from onnx_ir.passes import common

    graph = model.graph
    for node in _marked(graph):
        weight = _Weight(node)
        for use in list(node.outputs[0].uses()):
            _as_product(graph, use.node, weight)
    common.RemoveUnusedNodesPass()(model)
    for node in _marked(graph):
        _replace(node.outputs[0], _dequantized(graph, node, _Weight(node)))
    common.RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(_DOMAIN, None)
    if any(node.domain == _MICROSOFT for node in graph):
        model.opset_imports[_MICROSOFT] = 1


def _marked(graph: Any) -> list[Any]:
    return [node for node in graph if node.domain == _DOMAIN]


class _Weight:
    """The contents of a marked weight.

    Attributes:
        value: Its float value in the graph.
        name: Prefix of the names of its constants.
        shape: Shape of the float weight.
        transposed: See `transposed_groups`.
        group: Group size, see `WeightGrid`.
        rows: Number of rows.
        integers: int8 of shape ``(rows, columns)``, padded to whole groups.
        scales: float32 of shape ``(rows, groups)``.
        zero_points: The same shape; None for 0.
        bits: 4 or 8.
    """

    def __init__(self, node: Any) -> None:
        stored, scales, *points = (_array(value) for value in node.inputs)
        assert stored is not None
        self.value, self.name = node.outputs[0], node.inputs[0].name
        self.shape = list(node.attributes.get_ints("shape"))
        self.transposed, self.group = (node.attributes.get_int(name) for name in ("transposed", "group"))
        self.bits = 4 if stored.dtype == np.uint8 else 8
        if self.bits == 4:
            stored = np.stack([stored & 15, stored >> 4], -1).reshape(stored.shape[0], -1).astype(np.int8) - np.int8(8)
        self.scales = scales
        self.rows = stored.shape[0]
        padding = -self.values % self.group if self.group > 0 else 0
        self.integers = np.pad(stored[:, : self.values], ((0, 0), (0, padding)))
        self.zero_points = points[0] if points and points[0] is not None else None

    @property
    def values(self) -> int:
        """Number of values per row."""
        return int(math.prod(self.shape) // self.rows)

    def blocks(self) -> tuple[int, Any, Any, Any]:
        """Return a block size of MatMulNBits, and the integers, scales and zero points by block."""
        rows = self.rows
        size = min(self.group, _BLOCKS[-1]) if self.group > 0 else min(_BLOCKS, key=self._bytes_of_row)
        count = -(-self.values // size)
        integers = np.zeros((rows, count * size), np.int8)
        taken = min(self.integers.shape[1], count * size)
        integers[:, :taken] = self.integers[:, :taken]
        # A group larger than a block, or a whole row, is split into several blocks with the same scale.
        groups = np.arange(count) * size // self.group if self.group > 0 else np.zeros(count, np.int64)
        zero_points = None if self.zero_points is None else self.zero_points[:, groups]
        return size, integers.reshape(rows, count, size), self.scales[:, groups], zero_points

    def _bytes_of_row(self, size: int) -> int:
        count = -(-self.values // size)
        return int(count * (size * self.bits // 8 + 4))


def _as_product(graph: Any, reader: Any, weight: _Weight) -> None:
    """Replace a linear layer that reads a weight by MatMulNBits."""
    if len(weight.shape) != 2 or weight.transposed or 0 < weight.group < _BLOCKS[0]:
        return
    if reader.op_type == "Transpose" and not reader.outputs[0].is_graph_output():
        for use in list(reader.outputs[0].uses()):
            node = use.node
            if node.op_type == "MatMul" and use.idx == 1 and _is_matrix(node.inputs[0]):
                _replace(node.outputs[0], _product(graph, node, weight))
    elif reader.op_type == "Gemm" and reader.inputs[1] is weight.value and _is_plain(reader):
        product = _product(graph, reader, weight)
        if len(reader.inputs) > 2 and reader.inputs[2] is not None:
            product.shape, product.dtype = reader.outputs[0].shape, reader.outputs[0].dtype
            product = _node(graph, reader, "Add", [product, reader.inputs[2]])
        _replace(reader.outputs[0], product)


def _is_matrix(value: Any) -> bool:
    return value.shape is not None and len(value.shape) > 1


def _is_plain(gemm: Any) -> bool:
    """Whether a Gemm is a linear layer without scaling factors."""
    attributes = gemm.attributes
    factors = (attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0))
    turned = (attributes.get_int("transA", 0), attributes.get_int("transB", 0))
    return factors == (1.0, 1.0) and turned == (0, 1) and bool(gemm.inputs[0] is not gemm.inputs[1])


def _product(graph: Any, before: Any, weight: _Weight) -> Any:
    import onnx_ir as ir

    size, integers, scales, zero_points = weight.blocks()
    middle = 2 ** (weight.bits - 1)
    stored = _packed((integers.astype(np.int16) + middle).astype(np.uint8), weight.bits)
    inputs = [
        before.inputs[0],
        _once(graph, f"{weight.name}_blocks", stored),
        _once(graph, f"{weight.name}_block_scales", scales.reshape(-1).astype(np.float32)),
    ]
    if zero_points is not None:
        points = (zero_points.astype(np.int16) + middle).astype(np.uint8)
        inputs.append(_once(graph, f"{weight.name}_block_zero_points", _packed(points, weight.bits).reshape(-1)))
    outputs, values = weight.shape
    attributes = {"K": values, "N": outputs, "bits": weight.bits, "block_size": size}
    node = ir.node("MatMulNBits", inputs, attributes=attributes, domain=_MICROSOFT, version=1)
    graph.insert_before(before, node)
    return node.outputs[0]


def _packed(values: Any, bits: int) -> Any:
    """Pack two 4-bit values per byte along the last dimension, padded to whole bytes."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], -1)
    return values[..., ::2] | (values[..., 1::2] << 4)


def _once(graph: Any, name: str, array: Any) -> Any:
    """Return a constant, reusing the one that another reader of the weight created."""
    found = graph.initializers.get(name)
    return found if found is not None and np.array_equal(_array(found), array) else _constant(graph, name, array)


def _dequantized(graph: Any, before: Any, weight: _Weight) -> Any:
    """Return the float weight after a DequantizeLinear, for ops other than matrix products."""
    grouped, shape = weight.group > 0, weight.shape
    in_rows = grouped or bool(weight.transposed)
    integers, scales, zero_points = weight.integers, weight.scales, weight.zero_points
    if not grouped:
        # One scale per row, even if all rows have the same.
        integers, scales = integers[:, : weight.values], scales[:, 0]
        zero_points = None if zero_points is None else zero_points[:, 0]
    laid_out = _of_bits(integers if in_rows else integers.reshape(shape), weight.bits)
    inputs = [
        _constant(graph, f"{weight.name}_values", laid_out),
        _constant(graph, f"{weight.name}_scales", scales),
    ]
    if zero_points is not None:
        inputs.append(_constant(graph, f"{weight.name}_zero_points", _of_bits(zero_points, weight.bits)))
    groups = {"axis": 1, "block_size": weight.group} if grouped else {"axis": 0}
    value = _node(graph, before, "DequantizeLinear", inputs, **groups)
    if integers.shape[1] != weight.values and grouped:
        ends = [_constant(graph, "bounds", np.array([at], np.int64)) for at in (0, weight.values, 1)]
        value = _node(graph, before, "Slice", [value, *ends])
    if weight.transposed:
        parts = np.array([weight.transposed, shape[1], shape[0] // weight.transposed, -1], np.int64)
        value = _node(graph, before, "Reshape", [value, _constant(graph, "parts", parts)])
        value = _node(graph, before, "Transpose", [value], perm=[0, 2, 1, 3])
    if in_rows:
        value = _node(graph, before, "Reshape", [value, _constant(graph, "shape", np.array(shape, np.int64))])
    return value


def _of_bits(integers: Any, bits: int) -> Any:
    """Return int8 unchanged, or int4 for 4 bits."""
    import ml_dtypes

    return integers.astype(ml_dtypes.int4) if bits == 4 else integers.astype(np.int8)
