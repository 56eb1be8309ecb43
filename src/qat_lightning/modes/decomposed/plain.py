"""oneDNN's int8 layers on plain tensors, without a compiler or torch's quantized dtypes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Grid:
    """Scale, zero point, smallest and largest integer, and dtype of a tensor, as arguments of ops in a graph."""

    scale: float
    zero_point: int
    least: int
    greatest: int
    dtype: torch.dtype

    @property
    def is_whole(self) -> bool:
        """Whether it has all integers of the dtype."""
        limits = torch.iinfo(self.dtype)
        return (self.least, self.greatest) == (limits.min, limits.max)


@dataclass(frozen=True)
class Behind:
    """The ops that are fused into a layer after its products.

    Attributes:
        output: The grid of the output; None for float.
        activation: An activation by oneDNN's name, or ``"none"``.
        scalars: Parameters of the activation.
        added: The grid of a tensor that is added before the activation; None without one.
        copies: Whether that tensor has other readers and has to be copied, since the op overwrites it with the output.
    """

    output: Grid | None = None
    activation: str = "none"
    scalars: tuple[float, ...] = ()
    added: Grid | None = None
    copies: bool = True


class PlainLayer(nn.Module):
    """A convolution or linear layer as one oneDNN op: integers in; integers out, or float if no grid follows.

    Args:
        weight: int8, of shape (out channels, in channels / groups, kernel...) or (out features, in features).
        scales: float32, one for each output channel, or one.
        bias: float32, or None.
        source: The grid of the input.
        sizes: Stride, padding, dilation and groups of a convolution; empty for a linear layer.
    """

    def __init__(
        self, weight: Tensor, scales: Tensor, bias: Tensor | None, source: Grid, sizes: tuple[Any, ...] = ()
    ) -> None:
        super().__init__()
        self.source, self.sizes, self.behind = source, sizes, Behind()
        self.scales, self.bias = scales.detach().float(), None if bias is None else bias.detach().float()
        self.zero_points = torch.zeros(len(scales), dtype=torch.int32)
        ops, weight = torch.ops.onednn, weight.detach().contiguous()
        if sizes:
            grid = (source.scale, source.zero_point)
            self.packed = ops.qconv_prepack(weight, self.scales, *grid, *map(list, sizes[:3]), sizes[3], None)
        else:
            self.packed = ops.qlinear_prepack(weight, None)

    def followed_by(self, behind: Behind) -> PlainLayer:
        """The same layer with the same packed weight and other fused ops."""
        other = copy.copy(self)
        other.behind = behind
        return other

    @property
    def output(self) -> Grid | None:
        """The grid of the output; None for float."""
        return self.behind.output

    def forward(self, input: Tensor, added: Tensor | None = None) -> Tensor:
        """Compute integers on the output's grid from integers on the grids of the input and of the added tensor."""
        given = (input, self.source.scale, self.source.zero_point, self.packed, self.scales, self.zero_points)
        out, behind = self.output, self.behind
        to = (1.0, 0, torch.float32) if out is None else (out.scale, out.zero_point, out.dtype)
        activation = (behind.activation, list(behind.scalars), "")
        if added is not None:
            assert behind.added is not None
            result = self._summed(given, added, behind.added, to, activation)
        elif self.sizes:
            op: Any = torch.ops.onednn.qconv_pointwise.default
            result = op(*given, self.bias, *self.sizes, *to, *activation)
        else:
            op = torch.ops.onednn.qlinear_pointwise.default
            result = op(*given, self.bias, *to, *activation)
        return result if out is None or out.is_whole else result.clamp(out.least, out.greatest)

    def _summed(self, given: Any, added: Tensor, grid: Grid, to: Any, activation: Any) -> Tensor:
        # The op overwrites the added tensor, which needs the memory format of the output.
        over = added.contiguous(memory_format=torch.channels_last)
        if self.behind.copies and over.data_ptr() == added.data_ptr():
            over = over.clone()
        op: Any = torch.ops.onednn.qconv2d_pointwise.binary
        result: Tensor = op(
            *given, over, self.bias, *self.sizes, *to, grid.scale, grid.zero_point, "sum", 1.0, *activation
        )
        return result


def quantize(input: Tensor, scale: float, zero_point: int, least: int, greatest: int, dtype: torch.dtype) -> Tensor:
    """``quantized_decomposed.quantize_per_tensor`` in aten ops, which have kernels of their own."""
    scaled = (input * (1.0 / scale)).round_()
    if zero_point:
        scaled.add_(zero_point)
    return scaled.clamp_(least, greatest).to(dtype)


def dequantize(input: Tensor, scale: float, zero_point: int, least: int, greatest: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize`, except for its rounding."""
    value = input.to(torch.float32)
    return (value.sub_(zero_point) if zero_point else value).mul_(scale)


def in_order(input: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same tensor with its dimensions in a given order in memory, from the outermost; oneDNN has its own order."""
    return input.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])
