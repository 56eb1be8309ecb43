"""A decomposed graph on oneDNN's int8 kernels for plain tensors: no compiler, no quantized dtype of torch's.

Each convolution or linear layer between dequantize and quantize becomes one op that takes and gives uint8 tensors; a
ReLU goes into it. What is between the layers stays as the graph has it, in float.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_lightning.checks import LayerCheck
from qat_lightning.modes.decomposed.ops import DEQUANTIZE, QUANTIZE
from qat_lightning.modes.judging import is_faulty
from qat_lightning.modes.recording import Recorder
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import Backend

_aten = torch.ops.aten
_QUANTIZE, _DEQUANTIZE = QUANTIZE[0], DEQUANTIZE[0]
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)
_RELU = (_aten.relu.default, _aten.relu_.default)
_INTEGERS = (torch.uint8, torch.int8)

_LEAST_DB = 90.0
"""Of a layer whose output is not rounded to a grid: what the order of sums leaves between float kernels."""


@dataclass(frozen=True)
class _Grid:
    """Scale, zero point, least and greatest integer, and dtype of a tensor, as the ops of a graph have them."""

    scale: float
    zero_point: int
    least: int
    greatest: int
    dtype: torch.dtype

    @property
    def is_whole(self) -> bool:
        limits = torch.iinfo(self.dtype)
        return (self.least, self.greatest) == (limits.min, limits.max)


class PlainLayer(nn.Module):
    """A convolution or linear layer on one of oneDNN's ops: integers in; integers out, or float where no grid follows.

    Args:
        weight: int8, of shape (out channels, in channels / groups, kernel...) or (out features, in features).
        scales: float32, one for each output channel, or one.
        bias: float32, or None.
        source: The grid of the input.
        output: That of the output; None for float.
        relu: Whether a ReLU is behind it.
        sizes: Stride, padding, dilation and groups of a convolution; empty for a linear layer.
    """

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        source: _Grid,
        output: _Grid | None,
        *,
        relu: bool,
        sizes: tuple[Any, ...] = (),
    ) -> None:
        super().__init__()
        self.source, self.output, self.relu, self.sizes = source, output, relu, sizes
        self.scales, self.bias = scales.detach().float(), None if bias is None else bias.detach().float()
        self.zero_points = torch.zeros(len(scales), dtype=torch.int32)
        ops, weight = torch.ops.onednn, weight.detach().contiguous()
        if sizes:
            grid = (source.scale, source.zero_point)
            self.packed = ops.qconv_prepack(weight, self.scales, *grid, *map(list, sizes[:3]), sizes[3], None)
        else:
            self.packed = ops.qlinear_prepack(weight, None)

    def forward(self, input: Tensor) -> Tensor:
        """From the integers of the input's grid to those of the output's."""
        given = (input, self.source.scale, self.source.zero_point, self.packed, self.scales, self.zero_points)
        out = self.output
        to = (1.0, 0, torch.float32) if out is None else (out.scale, out.zero_point, out.dtype)
        behind: tuple[Any, ...] = ("relu" if self.relu else "none", [], "")
        if self.sizes:
            stride, padding, dilation, groups = self.sizes
            op: Any = torch.ops.onednn.qconv_pointwise.default
            result: Tensor = op(*given, self.bias, stride, padding, dilation, groups, *to, *behind)
        else:
            op = torch.ops.onednn.qlinear_pointwise.default
            result = op(*given, self.bias, *to, *behind)
        return result if out is None or out.is_whole else result.clamp(out.least, out.greatest)


def quantize(input: Tensor, scale: float, zero_point: int, least: int, greatest: int, dtype: torch.dtype) -> Tensor:
    """``quantized_decomposed.quantize_per_tensor`` in aten's ops, which have kernels of their own."""
    return torch.clamp(torch.round(input * (1.0 / scale)) + zero_point, least, greatest).to(dtype)


def dequantize(input: Tensor, scale: float, zero_point: int, least: int, greatest: int, dtype: torch.dtype) -> Tensor:
    """Undo `quantize`, up to its rounding."""
    return (input.to(torch.float32) - zero_point) * scale


@torch.no_grad()
def on_plain_kernels(decomposed: fx.GraphModule, tensors: list[Tensor], target: Backend) -> fx.GraphModule:
    """A decomposed graph with oneDNN's int8 kernels in the place of its layers.

    Each layer is compared with the ops that it stands for, on their own inputs; where it computes something else, or
    oneDNN refuses it, the ops stay.

    Args:
        decomposed: Quantize, dequantize and plain ops; left as it is.
        tensors: Its inputs in a real call.
        target: The backend, for its tolerance.
    """
    recorder = Recorder(decomposed, decomposed.graph)
    recorder.run(*tensors)
    graph = copy.deepcopy(decomposed.graph)
    lowered = fx.GraphModule(decomposed, graph)
    count = 0
    for node in list(graph.nodes):
        found = _layer(node, decomposed)
        if found is None:
            continue
        layer, end = found
        if layer is None or not _computes(layer, node, end, recorder.values, target):
            continue
        name = f"_plain_{count}"
        count += 1
        lowered.add_module(name, layer)
        with graph.inserting_before(end):
            made = graph.call_module(name, (node.args[0].args[0],))
        recorder.values[made.name] = recorder.values[end.name]
        end.replace_all_uses_with(made)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target in (_QUANTIZE, _DEQUANTIZE):
            node.target = quantize if node.target is _QUANTIZE else dequantize
    lowered.delete_all_unused_submodules()
    lowered.recompile()
    return lowered


def _layer(node: fx.Node, root: fx.GraphModule) -> tuple[PlainLayer | None, fx.Node] | None:
    """The layer of a node and the node whose value it yields; None if it is none."""
    if node.target not in (*_CONVOLUTIONS, _aten.linear.default) or node.kwargs:
        return None
    source, weight, bias = (*node.args, None)[:3]
    if not isinstance(source, fx.Node) or source.target is not _DEQUANTIZE or source.args[5] not in _INTEGERS:
        return None
    taken, added = _weight(weight, root), None if bias is None else _constant(bias, root)
    if taken is None or (bias is not None and added is None):
        return None
    end, relu = node, False
    if (behind := _only_user(end)) is not None and behind.target in _RELU:
        end, relu = behind, True
    output = None
    behind = _only_user(end)
    if behind is not None and behind.target is _QUANTIZE and behind.args[5] in _INTEGERS:
        end, output = behind, _Grid(*behind.args[1:])  # type: ignore[arg-type]
    sizes = _sizes(node) if node.target in _CONVOLUTIONS else ()
    try:
        given = _Grid(*source.args[1:])  # type: ignore[arg-type]
        return PlainLayer(*taken, added, given, output, relu=relu, sizes=sizes), end
    except (RuntimeError, AttributeError):  # oneDNN has no kernel for it, or this torch no oneDNN
        return None, end


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    dims = 1 + _CONVOLUTIONS.index(node.target)
    given: tuple[Any, ...] = (*node.args[3:], *([1], [0], [1], 1)[len(node.args) - 3 :])
    return *(list(size) * (dims if len(size) == 1 else 1) for size in given[:3]), given[3]


def _weight(node: Any, root: fx.GraphModule) -> tuple[Tensor, Tensor] | None:
    """The integers and scales of a weight that is symmetric; None for any other."""
    if not isinstance(node, fx.Node) or node.target not in DEQUANTIZE:
        return None
    integers = _constant(node.args[0], root)
    if integers is None or integers.dtype is not torch.int8:
        return None
    if node.target is _DEQUANTIZE:
        scales, zero = torch.tensor([float(node.args[1])]), int(node.args[2])  # type: ignore[arg-type]
        return (integers, scales) if zero == 0 else None
    found, zeros = _constant(node.args[1], root), _constant(node.args[2], root)
    if found is None or node.args[3] != 0 or (zeros is not None and bool(zeros.any())):
        return None
    return integers, found


def _constant(node: Any, root: fx.GraphModule) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(root)
    return value if isinstance(value, Tensor) else None


def _computes(layer: PlainLayer, node: fx.Node, end: fx.Node, values: dict[str, Any], target: Backend) -> bool:
    """Whether a layer gives what the ops gave that it stands for, but for roundings."""
    given: Any = node.args[0]
    wanted = values[end.name]
    try:
        result = layer(values[given.args[0].name])
    except RuntimeError:  # oneDNN has no kernel for this shape
        return False
    if layer.output is None:
        return sqnr_db(wanted, result) > _LEAST_DB
    grid = (layer.output.scale, layer.output.zero_point, 0, 0, wanted.dtype)
    steps = float((wanted.int() - result.int()).abs().max()) if result.numel() else 0.0
    check = LayerCheck(end.name, "", sqnr_db(dequantize(wanted, *grid), dequantize(result, *grid)), steps)
    return not is_faulty(check, target)
