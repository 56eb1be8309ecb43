"""Quantize and dequantize ops, and packed int8 layers rewritten with them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from qat_lightning.errors import ExportError

ops = torch.ops.quantized_decomposed

_PLAIN = {torch.quint8: torch.uint8, torch.qint8: torch.int8}
_LAYERS: dict[type[nn.Module], tuple[int, bool]] = {
    nnq.Linear: (0, False),
    nniq.LinearReLU: (0, True),
    nnq.Conv1d: (1, False),
    nniq.ConvReLU1d: (1, True),
    nnq.Conv2d: (2, False),
    nniq.ConvReLU2d: (2, True),
    nnq.Conv3d: (3, False),
    nniq.ConvReLU3d: (3, True),
}
"""For each packed layer, the number of spatial dimensions of its kernel, and whether a ReLU is fused."""


class Grid(NamedTuple):
    """Scale, zero point and dtype of an activation.

    Attributes:
        scale: The step size.
        zero_point: The integer that represents 0.
        dtype: ``torch.uint8`` or ``torch.int8``.
    """

    scale: float
    zero_point: int
    dtype: torch.dtype

    @classmethod
    def of(cls, quantized: Tensor) -> Grid:
        """Return the grid of a quantized tensor of torch.

        Raises:
            ExportError: The tensor is quantized per channel.
        """
        if quantized.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            raise ExportError("An activation with a scale for each channel cannot be exported.")
        return cls(quantized.q_scale(), quantized.q_zero_point(), _PLAIN[quantized.dtype])

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the quantize and dequantize ops after the tensor."""
        limits = torch.iinfo(self.dtype)
        return self.scale, self.zero_point, limits.min, limits.max, self.dtype


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """Quantize and dequantize a tensor.

    Example:
        >>> on_grid(torch.tensor([0.26, -9.0]), Grid(0.1, 10, torch.uint8))
        tensor([ 0.3000, -1.0000])
    """
    integers = ops.quantize_per_tensor.default(x, *grid.arguments())
    result: Tensor = ops.dequantize_per_tensor.default(integers, *grid.arguments())
    return result


class QdqLayer(nn.Module):
    """A packed int8 convolution or linear layer in plain ops: dequantized int8 weight, float op, quantize, dequantize.

    Args:
        weight: An int8 quantized tensor of torch.
        bias: float32; None for none.
        output: The grid of the output.
        relu: Whether a ReLU follows.
        sizes: Stride, padding, dilation and groups of a convolution; empty for a linear layer.
    """

    integers: Tensor
    bias: Tensor | None
    scales: Tensor
    zero_points: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, output: Grid, *, relu: bool, sizes: tuple[Any, ...] = ()
    ) -> None:
        super().__init__()
        self.register_buffer("integers", weight.int_repr().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
        if self.per_channel:
            self.register_buffer("scales", weight.q_per_channel_scales().float())
            self.register_buffer("zero_points", weight.q_per_channel_zero_points())
        else:
            self.weight_scale, self.weight_zero_point = weight.q_scale(), weight.q_zero_point()
        self.output, self.relu, self.sizes = output, relu, sizes
        self.limit = math.inf

    @classmethod
    def of(cls, module: Any) -> QdqLayer:
        """Create the layer from one of torch's quantized modules, which contains the grid of its output.

        Raises:
            ExportError: This type is not supported.
        """
        if type(module) not in _LAYERS:
            raise ExportError(f"{type(module).__name__} cannot be exported.")
        dims, relu = _LAYERS[type(module)]
        sizes = (module.stride, module.padding, module.dilation, module.groups) if dims else ()
        grid = Grid(float(module.scale), int(module.zero_point), torch.uint8)
        return cls(module.weight(), module.bias(), grid, relu=relu, sizes=sizes)

    def weight(self) -> Tensor:
        """Return the dequantized weight, computed by ops."""
        if self.per_channel:
            made = ops.dequantize_per_channel.default(
                self.integers, self.scales, self.zero_points, 0, -128, 127, torch.int8
            )
        else:
            scale, zero_point = self.weight_scale, self.weight_zero_point
            made = ops.dequantize_per_tensor.default(self.integers, scale, zero_point, -128, 127, torch.int8)
        weight: Tensor = made
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """Map a dequantized tensor to a dequantized tensor."""
        if self.sizes:
            convolution = getattr(F, f"conv{self.integers.dim() - 2}d")
            output = convolution(input, self.weight(), self.bias, *self.sizes)
        else:
            output = F.linear(input, self.weight(), self.bias)
        if self.relu:
            output = F.relu(output)
        if self.limit < math.inf:
            output = output.clamp(max=self.limit)
        return on_grid(output, self.output)
