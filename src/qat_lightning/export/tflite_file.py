"""Reading a LiteRT file by the schema of ai-edge-litert: inputs, outputs, and which layers are quantized."""

from __future__ import annotations

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
    """Return the bytes of a model from `read`."""
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def ports(path: Path) -> tuple[Port, ...]:
    """Return the int8 inputs and outputs of a file, with scale and zero point."""
    model = read(path.read_bytes())
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    return tuple(
        Port(kind, place, "int8", float(grid.scale[0]), int(grid.zeroPoint[0]))
        for kind, maps in (("input", signature.inputs), ("output", signature.outputs))
        for place, index in _in_order(maps)
        if is_int8(graph, index)
        for grid in [graph.tensors[index].quantization]
    )


def tensors(path: Path) -> tuple[list[int], list[int]]:
    """Return the indices of a file's inputs and outputs, in the order of the call."""
    signature = read(path.read_bytes()).signatureDefs[0]
    return [index for _, index in _in_order(signature.inputs)], [index for _, index in _in_order(signature.outputs)]


def kernels(path: Path) -> Kernels:
    """Count the layers with only integer inputs, and those of them whose kernel computes on integers."""
    model = read(path.read_bytes())
    graph = model.subgraphs[0]
    int8 = dequantized = 0
    made = {index: name for name, operator in operators(model) for index in operator.outputs}
    for name, operator in operators(model):
        if name not in _LAYERS:
            continue
        read_here = [operator.inputs[place] for place in _LAYERS[name]]
        int8 += all(is_int8(graph, index) for index in read_here)
        dequantized += all(made.get(index) == "DEQUANTIZE" for index in read_here)
    return Kernels(int8 + dequantized, int8)


def operators(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield each operator of a model with its name, in execution order."""
    from ai_edge_litert import schema_py_generated as schema

    names = {value: key for key, value in vars(schema.BuiltinOperator).items() if not key.startswith("_")}
    for operator in model.subgraphs[0].operators:
        code = model.operatorCodes[operator.opcodeIndex]
        yield names[max(code.builtinCode, code.deprecatedBuiltinCode)], operator


def is_int8(graph: Any, index: int) -> bool:
    """Whether a tensor has int8 values."""
    from ai_edge_litert import schema_py_generated as schema

    return bool(graph.tensors[index].type == schema.TensorType.INT8)


def _in_order(maps: list[Any]) -> list[tuple[int, int]]:
    """Return the position in the call, which ends each name of a signature, and the tensor index."""
    found = []
    for entry in maps:
        name = entry.name.decode() if isinstance(entry.name, bytes) else entry.name
        found.append((int(name.rpartition("_")[2]), entry.tensorIndex))
    return sorted(found)
