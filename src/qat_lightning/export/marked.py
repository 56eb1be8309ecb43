"""Integer layers of the kinds without calibration as ops that a format translates as a whole.

Runtimes represent a compressed weight as one op (MatMulNBits) or one constant in groups. That is hard to recognize
among the shifts and products that unpack a weight, so the graph to translate contains one marked op instead. Marked ops
also run in PyTorch, so that the graph can be compared with its network; no file contains them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.export.plain_layers import plain_integer_layer, with_class
from qat_lightning.layers.integer import IntegerLayer, WeightGrid
from qat_lightning.layers.integer.dynamic import DynamicLinear
from qat_lightning.layers.integer.plain_dynamic import PlainDynamicLinear
from qat_lightning.layers.integer.weight_only import WeightOnly
from qat_lightning.layers.integer.weights import dequantize_rows, weight_of_rows


@torch.library.custom_op(
    "qat_lightning::weight",
    mutates_args=(),
    schema="(Tensor stored, Tensor scales, Tensor? zero_points, int[] shape, int transposed, int low, int high, "
    "int group) -> Tensor",
)
def weight(
    stored: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    shape: list[int],
    transposed: int,
    low: int,
    high: int,
    group: int,
) -> Tensor:
    """Return the float32 weight for stored integers.

    Args:
        stored: From `qat_lightning.layers.integer.weights.store`.
        scales: Scales of shape ``(rows, groups)``.
        zero_points: Zero points of the same shape; None for a symmetric grid.
        shape: Shape of the weight.
        transposed: From `transposed_groups`.
        low: The smallest integer.
        high: The largest integer.
        group: Group size, see `WeightGrid`.
    """
    grid = WeightGrid(low, high, zero_points is None, group)
    values = torch.Size(shape).numel() // stored.shape[0]
    rows = dequantize_rows(stored, scales, zero_points, values, grid)
    return weight_of_rows(rows, shape, transposed).clone()  # an op must not return a view of its input


@weight.register_fake
def _(stored: Tensor, scales: Tensor, zero_points: Tensor | None, shape: list[int], *others: int) -> Tensor:
    return scales.new_empty(shape)


@torch.library.custom_op(
    "qat_lightning::dynamic_linear",
    mutates_args=(),
    schema="(Tensor input, Tensor columns, Tensor scales, Tensor? bias) -> Tensor",
)
def dynamic_linear(input: Tensor, columns: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose input is quantized to uint8 per tensor, with the range computed in the call.

    Args:
        input: Float, of shape ``(..., inputs)``.
        columns: int8 weight of shape ``(inputs, outputs)``.
        scales: One scale per output.
        bias: One value per output; None for none.
    """
    eps, ops = float(torch.finfo(torch.float32).eps), torch.ops.quantized_decomposed
    grid = (*ops.choose_qparams.tensor(input, 0, 255, eps, torch.uint8), 0, 255, torch.uint8)
    rounded = ops.dequantize_per_tensor.tensor(ops.quantize_per_tensor.tensor(input, *grid), *grid)
    return F.linear(rounded, (columns.float() * scales).t(), bias)


@dynamic_linear.register_fake
def _(input: Tensor, columns: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], columns.shape[1]))


class MarkedWeightOnly(WeightOnly):
    """`WeightOnly` that uses the marked op `weight`."""

    def dequantized(self, name: str) -> Tensor:
        """See `WeightOnly.dequantized`."""
        key, grid = self._key(name), self.grid
        stored, scales, points = (self._buffers[f"{key}_{part}"] for part in ("integers", "scales", "zero_points"))
        limits = (grid.quant_min, grid.quant_max, grid.group)
        made: Tensor = torch.ops.qat_lightning.weight(
            stored, scales, points, list(self.shapes[name]), self.transposed_groups, *limits
        )
        return made


class MarkedPlainDynamicLinear(PlainDynamicLinear):
    """`PlainDynamicLinear` that uses the marked op `weight`."""

    @property
    def weight(self) -> Tensor:
        """See `PlainDynamicLinear.weight`."""
        grid, shape = WeightGrid(*self.grid), [self.out_features, self.in_features]
        made: Tensor = torch.ops.qat_lightning.weight(
            self.integers, self.scales, None, shape, 0, grid.quant_min, grid.quant_max, grid.group
        )
        return made


class MarkedDynamicLinear(nn.Module):
    """`DynamicLinear` that uses the marked op `dynamic_linear`.

    Args:
        layer: The layer.
    """

    columns: Tensor
    scales: Tensor

    def __init__(self, layer: DynamicLinear) -> None:
        super().__init__()
        self.register_buffer("columns", layer.integers.t().contiguous())
        self.register_buffer("scales", layer.scales)
        self.register_buffer("bias", layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Accept any float input of shape ``(..., in_features)``."""
        made: Tensor = torch.ops.qat_lightning.dynamic_linear(input.float(), self.columns, self.scales, self.bias)
        return made


def marked(layer: IntegerLayer, name: str) -> nn.Module:
    """The `Spelling` of formats that translate `weight` and `dynamic_linear`.

    Raises:
        ExportError: This type of layer is not supported.
    """
    if isinstance(layer, DynamicLinear):
        return MarkedDynamicLinear(layer)
    if isinstance(layer, WeightOnly):
        return with_class(layer, MarkedWeightOnly)
    if isinstance(layer, PlainDynamicLinear):
        return with_class(layer, MarkedPlainDynamicLinear)
    return plain_integer_layer(layer, name)
