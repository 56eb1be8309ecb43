"""Rewrites of an ONNX graph so that runtimes recognize layers for which they have an int8 kernel.

Each function removes one obstacle, on the graph of an ``onnx_ir.Model``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_INT32 = 2**31 - 1
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Split", "Expand", "Identity")
"""Ops whose output contains only values of their first input."""


def rewrite(graph: Any, *, for_openvino: bool) -> None:
    """Rewrite a graph into the form that runtimes recognize.

    Args:
        graph: Graph of an ``onnx_ir.Model``; changed in place.
        for_openvino: Keep biases float, linear layers in their original dimensions, weights without a zero point, and
            one quantize op where ONNX Runtime needs the same grid on both sides of an op that only moves values.
    """
    _round_constants(graph)
    _transpose_weights(graph)
    _pools(graph)
    _fold_zeros(graph)
    if for_openvino:
        _round_once(graph)
        _drop_zero_points(graph)
    else:
        _matrices(graph)
        _round_biases(graph)


def _array(value: Any) -> Any:
    """Return the array of a constant value; None if it is not constant."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _constant(graph: Any, name: str, array: Any) -> Any:
    """Create an initializer."""
    import onnx_ir as ir

    while name in graph.initializers:
        name += "_"
    value = ir.val(name, const_value=ir.tensor(np.asarray(array, order="C"), name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def _node(graph: Any, before: Any, op_type: str, inputs: list[Any], **attributes: Any) -> Any:
    """Create a node and return its output."""
    import onnx_ir as ir

    node = ir.node(op_type, inputs, attributes=attributes)
    graph.insert_before(before, node)
    return node.outputs[0]


def _producer(value: Any, op_type: str) -> Any:
    """Return the node that computes a value, if it has this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _of_weight(value: Any) -> Any:
    """Return the DequantizeLinear of a constant that a value comes from; None if there is none."""
    node = _producer(value, "DequantizeLinear")
    return node if node is not None and _array(node.inputs[0]) is not None else None


def _round_constants(graph: Any) -> None:
    """Store a constant that is quantized in the graph, such as a positional embedding, as integers."""
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
            continue
        value, scale, zero = (_array(given) for given in node.inputs)
        if value is None or scale is None or zero is None or scale.ndim:
            continue
        limits = np.iinfo(zero.dtype)
        rounded = np.clip(np.rint(value / scale) + zero.astype(np.float32), limits.min, limits.max).astype(zero.dtype)
        _replace(node.outputs[0], _constant(graph, f"{node.inputs[0].name}_integers", rounded))


def _round_once(graph: Any) -> None:
    """Remove a quantize and dequantize pair if its input is already on that grid, so that it changes nothing.

    The pair stays before ops that only move values (such as splitting attention heads), where a kernel can write
    integers.
    """
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or _array(node.inputs[1]) is None or _array(node.inputs[1]).ndim:
            continue
        source = node.inputs[0]
        while (moved := source.producer()) is not None and moved.op_type in _MOVES:
            source = moved.inputs[0]
        grid = _producer(source, "DequantizeLinear")
        if grid is None or not _same_grid(grid, node):
            continue
        for use in list(node.outputs[0].uses()):
            if use.node.op_type == "DequantizeLinear" and use.idx == 0 and _same_grid(use.node, node):
                _replace(use.node.outputs[0], node.inputs[0])


def _same_grid(one: Any, other: Any) -> bool:
    """Whether two nodes have the same scale and zero point."""
    grids = [[_array(value) for value in node.inputs[1:]] for node in (one, other)]
    return len(grids[0]) == len(grids[1]) and all(
        mine is not None and its is not None and mine.dtype == its.dtype and np.array_equal(mine, its)
        for mine, its in zip(*grids, strict=True)
    )


def _transpose_weights(graph: Any) -> None:
    """Transpose the integers of a weight instead of the dequantized values."""
    for node in list(graph):
        weight = _of_weight(node.inputs[0]) if node.op_type == "Transpose" else None
        if weight is None or _array(weight.inputs[0]).ndim != 2:
            continue
        integers, scale, *zero = weight.inputs
        turned = _constant(graph, f"{integers.name}_transposed", _array(integers).T)
        axis = 1 - weight.attributes.get_int("axis", 1)
        made = _node(graph, node, "DequantizeLinear", [turned, scale, *zero], axis=axis)
        _replace(node.outputs[0], made)


def _drop_zero_points(graph: Any) -> None:
    """Remove zero points of 0 from weights; 0 is the default of DequantizeLinear."""
    for node in graph:
        if node.op_type == "DequantizeLinear" and _array(node.inputs[0]) is not None and len(node.inputs) > 2:
            zero = _array(node.inputs[2])
            if zero is not None and not zero.any():
                node.replace_input_with(2, None)


def _matrices(graph: Any) -> None:
    """Rewrite linear layers with more than two dimensions as Gemm, for which int8 kernels with bias exist."""
    for node in list(graph):
        if node.op_type != "MatMul" or _of_weight(node.inputs[1]) is None:
            continue
        users = list(node.outputs[0].uses())
        add: Any = users[0].node if len(users) == 1 and users[0].node.op_type == "Add" else None
        bias = None if add is None else next((v for v in add.inputs if v is not node.outputs[0]), None)
        shape, weight = node.inputs[0].shape, node.inputs[1]
        if _array(bias) is None or _array(bias).ndim != 1 or shape is None or len(shape) < 3:
            continue
        grid = _producer(node.inputs[0], "DequantizeLinear")
        if grid is None or not _is_uint8(grid) or not all(isinstance(dim, int) for dim in shape[1:]):
            continue
        outputs = _array(bias).shape[0]
        rows = _constant(graph, "rows", np.array([-1, shape[-1]], dtype=np.int64))
        back = _constant(graph, "back", np.array([-1, *shape[1:-1], outputs], dtype=np.int64))
        # Reshape the integers rather than the float values, because the kernel reads them after the reshape.
        integers = _node(graph, node, "Reshape", [grid.inputs[0], rows])
        flat = _node(graph, node, "DequantizeLinear", [integers, *grid.inputs[1:]])
        product = _node(graph, node, "Gemm", [flat, weight, bias])
        after = list(add.outputs[0].uses())
        rounded: Any = after[0].node if len(after) == 1 and after[0].node.op_type == "QuantizeLinear" else None
        if rounded is not None:
            integers = _node(graph, rounded, "QuantizeLinear", [product, *rounded.inputs[1:]])
            _replace(rounded.outputs[0], _node(graph, rounded, "Reshape", [integers, back]))
        else:
            _replace(add.outputs[0], _node(graph, add, "Reshape", [product, back]))


def _is_uint8(grid: Any) -> bool:
    """Whether a dequantized value has a known uint8 grid."""
    zero = _array(grid.inputs[2]) if len(grid.inputs) > 2 else None
    return zero is not None and zero.dtype == np.uint8 and _array(grid.inputs[1]) is not None


def _round_biases(graph: Any) -> None:
    """Quantize biases to int32 with scale = input scale * weight scale, like the accumulators of int8 kernels.

    Not with int8 activations, because their runtimes (TensorRT) require float biases, and not where a value overflows.
    """
    for node in list(graph):
        if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3:
            continue
        grid, weight, bias = _producer(node.inputs[0], "DequantizeLinear"), _of_weight(node.inputs[1]), node.inputs[2]
        if grid is None or weight is None or _array(bias) is None or bias.dtype.numpy() != np.float32:
            continue
        if not _is_uint8(grid):
            continue
        scales = _array(grid.inputs[1]).astype(np.float32) * _array(weight.inputs[1]).astype(np.float32)
        integers = np.rint(_array(bias).astype(np.float64) / scales)
        if not np.isfinite(integers).all() or np.abs(integers).max(initial=0) > _INT32:
            continue
        name = bias.name or "bias"
        inputs = [
            _constant(graph, f"{name}_integers", integers.astype(np.int32)),
            _constant(graph, f"{name}_scale", scales),
            _constant(graph, f"{name}_zero_point", np.zeros(scales.shape, dtype=np.int32)),
        ]
        axis = {"axis": 0} if scales.ndim else {}
        node.replace_input_with(2, _node(graph, node, "DequantizeLinear", inputs, **axis))


def _pools(graph: Any) -> None:
    """Replace a mean over the spatial dimensions by the pooling op for which runtimes have an int8 kernel."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2 or _array(node.inputs[1]) is None:
            continue
        shape, axes = node.inputs[0].shape, _array(node.inputs[1])
        if shape is None or len(shape) != 4 or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        pooled = _node(graph, node, "GlobalAveragePool", [node.inputs[0]])
        if node.attributes.get_int("keepdims", 1):
            _replace(node.outputs[0], pooled)
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if len(readers) == 1 and readers[0].op_type == "QuantizeLinear" and not node.outputs[0].is_graph_output():
            # Quantized directly, so that one kernel reads and writes integers.
            integers = _node(graph, readers[0], "QuantizeLinear", [pooled, *readers[0].inputs[1:]])
            _replace(readers[0].outputs[0], _node(graph, readers[0], "Flatten", [integers], axis=1))
        else:
            _replace(node.outputs[0], _node(graph, node, "Flatten", [pooled], axis=1))


def _fold_zeros(graph: Any) -> None:
    """Move zero padding around an image into the convolutions that read it; every grid represents zero."""
    import onnx_ir as ir

    for node in list(graph):
        amounts = _zeros_around(node) if node.op_type == "Pad" else None
        behind = _convolutions_after(node.outputs[0])
        if amounts is None or behind is None:
            continue
        values, convolutions = behind
        for value in values:
            value.shape = node.inputs[0].shape
        for convolution in convolutions:
            before = convolution.attributes.get_ints("pads", [0] * len(amounts))
            added = [int(one + other) for one, other in zip(before, amounts, strict=True)]
            convolution.attributes["pads"] = ir.AttrInt64s("pads", added)
        for use in list(node.outputs[0].uses()):
            use.node.replace_input_with(use.idx, node.inputs[0])


def _zeros_around(node: Any) -> list[int] | None:
    """Return the pads that a Pad op adds before and after each spatial dimension; None if it does something else."""
    shape, amounts = node.inputs[0].shape, _array(node.inputs[1])
    fill, axes = (node.inputs[index] if index < len(node.inputs) else None for index in (2, 3))
    if shape is None or amounts is None or node.attributes.get_string("mode", "constant") != "constant":
        return None
    if fill is not None and (_array(fill) is None or _array(fill).any()):
        return None
    over = range(len(shape)) if axes is None else _array(axes)
    if over is None:
        return None
    each = {int(axis) % len(shape): pair for axis, pair in zip(over, amounts.reshape(2, -1).T, strict=True)}
    pairs = np.array([each.get(axis, (0, 0)) for axis in range(len(shape))]).T
    return None if pairs[:, :2].any() or (pairs < 0).any() else [int(amount) for amount in pairs[:, 2:].flatten()]


def _convolutions_after(value: Any) -> tuple[list[Any], list[Any]] | None:
    """Return Convs that read a value, and the values between; None if anything else reads the value."""
    if value.is_graph_output():
        return None
    values, convolutions = [value], []
    for use in value.uses():
        if use.node.op_type == "Conv" and use.idx == 0:
            if use.node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
                return None
            convolutions.append(use.node)
            continue
        behind = None
        if use.node.op_type in ("QuantizeLinear", "DequantizeLinear") and use.idx == 0:
            behind = _convolutions_after(use.node.outputs[0])
        if behind is None:
            return None
        values += behind[0]
        convolutions += behind[1]
    return values, convolutions


def _replace(old: Any, new: Any) -> None:
    """Make all readers of one value read another, which takes over its name, type and shape."""
    new.shape, new.dtype = old.shape, old.dtype
    graph = old.producer().graph
    for index, output in enumerate(graph.outputs):
        if output is old:
            new.name, old.name = old.name, None
            graph.outputs[index] = new
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, new)
