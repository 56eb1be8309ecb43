"""What is in a LiteRT file: the types of its inputs and outputs, and which layers are on integers.

Read and written with the flatbuffer schema of ai-edge-litert.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qat_lightning.export.protocol import Kernels, Port

# Which inputs of a layer are its activations and its weight.
_LAYERS = {
    "CONV_2D": (0, 1),
    "DEPTHWISE_CONV_2D": (0, 1),
    "CONV_3D": (0, 1),
    "FULLY_CONNECTED": (0, 1),
    "BATCH_MATMUL": (0, 1),
    "TRANSPOSE_CONV": (2, 1),
}


def read(content: bytes) -> Any:
    """The model of a file, as objects that can be changed."""
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))


def packed(model: Any) -> bytes:
    """Undo `read`."""
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def with_float_ports(content: bytes) -> bytes:
    """A file whose int8 inputs and outputs are float: a quantize or a dequantize op stands at each of them.

    Args:
        content: Of a file all of whose int8 inputs and outputs stand for floats.
    """
    model = read(content)
    (graph,) = model.subgraphs
    (signature,) = model.signatureDefs
    graph.inputs, graph.outputs = list(graph.inputs), list(graph.outputs)
    for place, index in enumerate(graph.inputs):
        if _is_int8(graph, index):
            outside = _float_like(graph, index)
            graph.inputs[place] = outside
            _name(signature.inputs, index, outside)
            graph.operators.insert(0, _operator(model, "QUANTIZE", outside, index))
    renamed: dict[int, int] = {}
    for place, index in enumerate(graph.outputs):
        if _is_int8(graph, index):
            if index not in renamed:
                renamed[index] = _float_like(graph, index)
                graph.operators.append(_operator(model, "DEQUANTIZE", index, renamed[index]))
                _name(signature.outputs, index, renamed[index])
            graph.outputs[place] = renamed[index]
    return packed(model)


def ports(path: Path) -> tuple[Port, ...]:
    """The int8 inputs and outputs of a file, with the grid that each is on."""
    model = read(path.read_bytes())
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    return tuple(
        Port(kind, place, "int8", float(grid.scale[0]), int(grid.zeroPoint[0]))
        for kind, maps in (("input", signature.inputs), ("output", signature.outputs))
        for place, index in _in_order(maps)
        if _is_int8(graph, index)
        for grid in [graph.tensors[index].quantization]
    )


def tensors(path: Path) -> tuple[list[int], list[int]]:
    """The indices of the inputs and of the outputs of a file, in the order of the call."""
    signature = read(path.read_bytes()).signatureDefs[0]
    return [index for _, index in _in_order(signature.inputs)], [index for _, index in _in_order(signature.outputs)]


def kernels(path: Path) -> Kernels:
    """How many layers read integers alone, and of how many the kernel does."""
    model = read(path.read_bytes())
    graph = model.subgraphs[0]
    int8 = dequantized = 0
    made = {index: name for name, operator in _operators(model) for index in operator.outputs}
    for name, operator in _operators(model):
        if name not in _LAYERS:
            continue
        read_here = [operator.inputs[place] for place in _LAYERS[name]]
        int8 += all(_is_int8(graph, index) for index in read_here)
        dequantized += all(made.get(index) == "DEQUANTIZE" for index in read_here)
    return Kernels(int8 + dequantized, int8)


def _operators(model: Any) -> Iterator[tuple[str, Any]]:
    from ai_edge_litert import schema_py_generated as schema

    names = {value: key for key, value in vars(schema.BuiltinOperator).items() if not key.startswith("_")}
    for operator in model.subgraphs[0].operators:
        code = model.operatorCodes[operator.opcodeIndex]
        yield names[max(code.builtinCode, code.deprecatedBuiltinCode)], operator


def _is_int8(graph: Any, index: int) -> bool:
    from ai_edge_litert import schema_py_generated as schema

    return bool(graph.tensors[index].type == schema.TensorType.INT8)


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
    """Let the names of a signature that stand for one tensor stand for another."""
    for entry in maps:
        if entry.tensorIndex == before:
            entry.tensorIndex = after


def _in_order(maps: list[Any]) -> list[tuple[int, int]]:
    """The number at the end of each name of a signature, which is its place in the call, and its tensor."""
    found = []
    for entry in maps:
        name = entry.name.decode() if isinstance(entry.name, bytes) else entry.name
        found.append((int(name.rpartition("_")[2]), entry.tensorIndex))
    return sorted(found)
