"""Corrections to the file that LiteRT's converter creates from an int8 network.

The converter treats pairs of quantize and dequantize ops as permission to compute on integers, and does so too often:
some kernels do not support the trained grids, and some round intermediate results.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from qat_lightning.export.tflite_file import is_int8, operators, packed, read

_STEP = 1 / 256
_FIXED = {
    "SOFTMAX": (_STEP, -128),
    "LOGISTIC": (_STEP, -128),
    "TANH": (2 * _STEP, 0),
    "LOG_SOFTMAX": (16 * _STEP, 127),
    "L2_NORMALIZATION": (2 * _STEP, 0),
}
"""Output scale and zero point that LiteRT's int8 kernels require."""

_AVERAGES = ("AVERAGE_POOL_2D", "RESIZE_BILINEAR")
"""Kernels that round to the grid of their input, whatever grid follows in the network."""


def finished(content: bytes, *, float_ports: bool) -> bytes:
    """Return the corrected file of an int8 network.

    - Remove the ops that separate two grids for the converter (`qat_lightning.export.tflite_graph.apart`).
    - Run kernels in float, between a dequantize and a quantize op, if they require another grid than the network's.
    - The same for averages whose output has its own grid, which would be rounded twice.
    - With float ports, add a quantize or dequantize op at each int8 input and output.

    Args:
        content: The converter's file, with int8 inputs and outputs.
        float_ports: Whether inputs and outputs should be float.
    """
    model = read(content)
    (graph,) = model.subgraphs
    graph.inputs, graph.outputs = list(graph.inputs), list(graph.outputs)
    graph.operators = list(graph.operators)
    _take_out_limits(model)
    _on_floats(model)
    if float_ports:
        _with_float_ports(model)
    return packed(model)


def _take_out_limits(model: Any) -> None:
    """Remove every maximum with the lowest integer, which has no effect."""
    (graph,) = model.subgraphs
    for name, operator in list(operators(model)):
        if name != "MAXIMUM":
            continue
        (output,) = operator.outputs
        kept = [index for index in operator.inputs if not _is_least(model, index)]
        if len(kept) == 1 and is_int8(graph, output) and _grid(graph, kept[0]) == _grid(graph, output):
            graph.operators.remove(operator)
            _read_instead(model, output, kept[0])


def _is_least(model: Any, index: int) -> bool:
    (graph,) = model.subgraphs
    data = model.buffers[graph.tensors[index].buffer].data
    if data is None or not is_int8(graph, index):
        return False
    return bool((np.asarray(data, np.uint8).view(np.int8) == -128).all())


def _on_floats(model: Any) -> None:
    """Run kernels in float that would give wrong values, or round twice, on integers."""
    (graph,) = model.subgraphs
    for name, operator in list(operators(model)):
        (output, *_) = operator.outputs
        if not is_int8(graph, output):
            continue
        if name in _FIXED and not np.allclose(_grid(graph, output), _FIXED[name], rtol=1e-3):
            target = output
        elif name in _AVERAGES and (requantized := _requantized(model, output)) is not None:
            graph.operators.remove(requantized)
            (target,) = requantized.outputs
        else:
            continue
        given, made = _float_like(graph, operator.inputs[0]), _float_like(graph, output)
        before = _operator(model, "DEQUANTIZE", operator.inputs[0], given)
        operator.inputs, operator.outputs = [given, *operator.inputs[1:]], [made]
        place = graph.operators.index(operator)
        graph.operators[place : place + 1] = [before, operator, _operator(model, "QUANTIZE", made, target)]


def _requantized(model: Any, index: int) -> Any:
    """Return the quantize op that reads an int8 tensor; None if anything else reads it too."""
    (graph,) = model.subgraphs
    readers = [(name, operator) for name, operator in operators(model) if index in list(operator.inputs)]
    if index in graph.outputs or [name for name, _ in readers] != ["QUANTIZE"]:
        return None
    return readers[0][1]


def _with_float_ports(model: Any) -> None:
    """Add a quantize or dequantize op at each int8 input and output."""
    (graph,) = model.subgraphs
    (signature,) = model.signatureDefs
    for place, index in enumerate(graph.inputs):
        if is_int8(graph, index):
            graph.inputs[place] = _float_like(graph, index)
            _name(signature.inputs, index, graph.inputs[place])
            graph.operators.insert(0, _operator(model, "QUANTIZE", graph.inputs[place], index))
    made: dict[int, int] = {}
    for place, index in enumerate(graph.outputs):
        if not is_int8(graph, index):
            continue
        if index not in made:
            made[index] = _float_like(graph, index)
            graph.operators.append(_operator(model, "DEQUANTIZE", index, made[index]))
            _name(signature.outputs, index, made[index])
        graph.outputs[place] = made[index]


def _read_instead(model: Any, before: int, after: int) -> None:
    """Make all readers of one tensor read another."""
    (graph,) = model.subgraphs
    for operator in graph.operators:
        operator.inputs = [after if index == before else index for index in operator.inputs]
    graph.outputs = [after if index == before else index for index in graph.outputs]
    _name(model.signatureDefs[0].outputs, before, after)


def _grid(graph: Any, index: int) -> tuple[float, int]:
    grid = graph.tensors[index].quantization
    return float(grid.scale[0]), int(grid.zeroPoint[0])


def _float_like(graph: Any, index: int) -> int:
    from ai_edge_litert import schema_py_generated as schema

    made = copy.copy(graph.tensors[index])
    made.name = made.name + (b"_float" if isinstance(made.name, bytes) else "_float")
    made.type, made.quantization, made.buffer = schema.TensorType.FLOAT32, None, 0
    graph.tensors.append(made)
    return len(graph.tensors) - 1


def _operator(model: Any, name: str, source: int, target: int) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, name)
    code.version = 2 if name == "DEQUANTIZE" else 1  # the first versions of each with int8
    model.operatorCodes.append(code)
    operator = schema.OperatorT()
    operator.opcodeIndex = len(model.operatorCodes) - 1
    operator.inputs, operator.outputs = [source], [target]
    return operator


def _name(maps: list[Any], before: int, after: int) -> None:
    """Make the names of a signature that refer to one tensor refer to another."""
    for entry in maps:
        if entry.tensorIndex == before:
            entry.tensorIndex = after
