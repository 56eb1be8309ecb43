"""The graph of a quantized network in the form that LiteRT's converter turns into int8 kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import fx

from qat_lightning.errors import ExportError

_OPS = torch.ops.quantized_decomposed
_QUANTIZE_OF = {
    _OPS.dequantize_per_tensor.default: _OPS.quantize_per_tensor.default,
    _OPS.dequantize_per_channel.default: _OPS.quantize_per_channel.default,
}
_PAIR = (_OPS.quantize_per_tensor.default, _OPS.dequantize_per_tensor.default)
_FULL = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
_SHIFT = 128


def for_litert(graph_module: fx.GraphModule) -> None:
    """Rewrite a graph of flat tensors in place.

    LiteRT's kernels take int8 activations and weights from -127 to 127 with zero point 0. A uint8 grid and the int8
    grid whose zero point is 128 less have the same values, so that nothing is rounded anew. An integer weight behind a
    dequantize op becomes the float weight that it stands for, behind a quantize and a dequantize op: the converter
    finds the integers in such a pair only.

    Args:
        graph_module: As `qat_lightning.export.pt2.flat_graph` gives it.

    Raises:
        ExportError: An activation or a weight is on a grid that LiteRT's int8 kernels have not.

    Example:
        >>> grid = (0.5, 128, 0, 255, torch.uint8)
        >>> def pair(x: Tensor) -> Tensor:
        ...     return _OPS.dequantize_per_tensor.default(_OPS.quantize_per_tensor.default(x, *grid), *grid)
        >>> graph_module = fx.symbolic_trace(pair)
        >>> for_litert(graph_module)
        >>> [node.args[1:] for node in graph_module.graph.nodes if node.op == "call_function"][0]
        (0.5, 0, -128, 127, torch.int8)
        >>> graph_module(torch.tensor([0.6, -80.0]))
        tensor([  0.5000, -64.0000])
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target in _QUANTIZE_OF and _is_constant(node.args[0]):
            _as_pair(graph_module, node)
        elif node.target in _PAIR:
            _as_int8(node)
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _as_int8(node: fx.Node) -> None:
    source, scale, zero_point, low, high, dtype = node.args
    if _FULL.get(dtype) != (low, high):  # type: ignore[arg-type]
        raise ExportError(
            f"LiteRT's int8 kernels use all of their 8 bits, and {node.name!r} is {dtype} from {low} to {high}: use a "
            "scheme of activation_bits=8."
        )
    shift = _SHIFT if dtype == torch.uint8 else 0
    node.args = (source, scale, zero_point - shift, *_FULL[torch.int8], torch.int8)  # type: ignore[operator]


def _as_pair(graph_module: fx.GraphModule, node: fx.Node) -> None:
    integers, *grid = (_value(graph_module, argument) for argument in node.args)
    if integers.dtype != torch.int8 or int(integers.min()) < -127:
        raise ExportError(f"LiteRT's weights are int8 from -127 to 127, and {node.name!r} is {integers.dtype}.")
    if bool(torch.as_tensor(grid[1]).count_nonzero()):
        raise ExportError(
            f"LiteRT's int8 kernels take weights with zero point 0, and {node.name!r} has others: use a scheme of "
            "weight_symmetric=True."
        )
    name = f"_float_{node.name}"
    graph_module.register_buffer(name, node.target(integers, *grid))  # type: ignore[operator]
    *where, _, _, dtype = node.args[1:]
    limits = (*where, -127, 127, dtype)
    with graph_module.graph.inserting_before(node):
        weight = graph_module.graph.get_attr(name)
        quantize: Any = _QUANTIZE_OF[node.target]  # type: ignore[index]
        node.args = (graph_module.graph.call_function(quantize, (weight, *limits)), *limits)


def _is_constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _value(graph_module: fx.GraphModule, argument: Any) -> Any:
    if not _is_constant(argument):
        return argument
    found: Any = graph_module
    for name in argument.target.split("."):
        found = getattr(found, name)
    return found
