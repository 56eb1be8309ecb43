"""Weights on an integer grid: rounding, packing two 4-bit values per byte, and dequantizing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat_lightning.numerics.grid import choose_qparams
from qat_lightning.numerics.observers import least_squares_clip
from qat_lightning.settings.recipe import Recipe


@dataclass(frozen=True)
class WeightGrid:
    """How the rows of a weight (`weight_rows`) are quantized.

    Attributes:
        quant_min: Smallest integer.
        quant_max: Largest integer.
        symmetric: Whether the zero point is 0.
        group: 0 for one scale per row, -1 for one per tensor, otherwise the number of values in a row that share a
            scale.
        clipped: Whether the range is the share of the full range with the least mean squared error.
    """

    quant_min: int = -127
    quant_max: int = 127
    symmetric: bool = True
    group: int = 0
    clipped: bool = False

    def __post_init__(self) -> None:
        """Reject a grid that does not fit into a byte, since a grid may come from a file."""
        limits = type(self.quant_min) is type(self.quant_max) is int and -128 <= self.quant_min < self.quant_max <= 127
        size = self.group
        group = type(size) is int and (size in (-1, 0) or (2 <= size <= 1024 and size & (size - 1) == 0))
        if not (limits and group and type(self.symmetric) is type(self.clipped) is bool):
            raise ValueError(f"{self} is not a grid of int8 weights")

    @classmethod
    def of(cls, recipe: Recipe) -> WeightGrid:
        """The grid that a recipe asks for."""
        scheme = recipe.scheme
        # These layers run float kernels, so no limit of an int8 kernel applies.
        on_float = recipe.kind == "weight_only" or recipe.by_token_or_group
        half = scheme.weight_quant_max if on_float else recipe.weight_quant_max
        return cls(
            quant_min=-half if scheme.weight_symmetric else -(2 ** (scheme.weight_bits - 1)),
            quant_max=half,
            symmetric=scheme.weight_symmetric,
            group={"per_channel": 0, "per_tensor": -1}.get(scheme.weight_granularity, scheme.weight_group_size),
            clipped=scheme.chosen_weight_observer == "mse",
        )

    @property
    def packs(self) -> bool:
        """Whether a value fits into 4 bits."""
        return self.quant_min >= HALF_BYTES.quant_min and self.quant_max <= HALF_BYTES.quant_max

    def columns(self, values: int) -> int:
        """Number of stored values per row: whole bytes."""
        return values + values % 2 if self.packs else values

    def padding(self, values: int) -> int:
        """Number of zeros that make the values of a row whole groups; they are not stored."""
        return -values % self.group if self.group > 0 else 0

    def empty(self, rows: int, values: int) -> tuple[Tensor, Tensor]:
        """Integers (all 0) and scales (all 1), in the shapes that `store` and `quantize_rows` return."""
        columns = self.columns(values)
        dtype, width = (torch.uint8, columns // 2) if self.packs else (torch.int8, columns)
        groups = (values + self.padding(values)) // self.group if self.group > 0 else 1
        return torch.zeros(rows, width, dtype=dtype), torch.ones(rows, groups)


HALF_BYTES = WeightGrid(-8, 7)
"""The widest grid whose values `store` packs two per byte."""


def transposed_groups(layer: nn.Module) -> int:
    """The groups of a transposed convolution, whose weight has its outputs in dimension 1; 0 for other layers.

    Example:
        >>> transposed_groups(nn.ConvTranspose2d(4, 6, 3, groups=2)), transposed_groups(nn.Conv2d(4, 6, 3))
        (2, 0)
    """
    return layer.groups if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0


def weight_rows(weight: Tensor, groups: int) -> Tensor:
    """A weight as one row per output of its layer.

    Args:
        weight: A weight with at least one dimension.
        groups: The result of `transposed_groups`.

    Returns:
        Shape ``(outputs, values)``.

    Example:
        >>> weight_rows(torch.tensor([[1, 2, 3], [4, 5, 6]]), 1).tolist()
        [[1, 4], [2, 5], [3, 6]]
    """
    if not groups:
        return weight.reshape(weight.shape[0], -1)
    inputs, outputs = weight.shape[:2]
    parts = weight.reshape(groups, inputs // groups, outputs, -1)
    return parts.transpose(1, 2).reshape(groups * outputs, -1)


def weight_of_rows(rows: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """Inverse of `weight_rows`."""
    if not groups:
        return rows.reshape(shape)
    parts = rows.reshape(groups, shape[1], shape[0] // groups, -1)
    return parts.transpose(1, 2).reshape(shape)


def quantize_rows(weight: Tensor, grid: WeightGrid, share: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to its grid with the arithmetic of `fake_quantize`, so that both give the same values.

    Args:
        weight: Floating, of any shape with at least one dimension.
        grid: The grid.
        share: For a clipped grid, the share of each range that is represented, as training chose it; None to choose it
            now by the least mean squared error.

    Returns:
        Integers, int8 of shape ``(rows, values)``; scales, float32, and zero points, int8, of shape ``(rows, groups)``.

    Example:
        >>> integers, scales, _ = quantize_rows(torch.tensor([[-1.0, 0.5], [0.0, 2.54]]), WeightGrid())
        >>> integers.tolist(), [round(scale, 4) for scale in scales.flatten().tolist()]
        ([[-127, 64], [0, 127]], [0.0079, 0.02])
    """
    rows = weight.detach().float().reshape(weight.shape[0], -1)
    count, values = rows.shape
    if grid.group > 0:
        padded = torch.nn.functional.pad(rows, (0, grid.padding(values)))
        ranges = padded.reshape(-1, grid.group)
    else:
        padded = rows
        ranges = rows.reshape(1, -1) if grid.group < 0 else rows
    low, high = torch.aminmax(ranges, dim=1)
    limits = {"quant_min": grid.quant_min, "quant_max": grid.quant_max}
    if grid.clipped:
        if share is None:
            share = least_squares_clip(ranges, symmetric=grid.symmetric, **limits)
        share = share.reshape(-1).to(low)
        low, high = low * share, high * share
    scales, zero_points = choose_qparams(low, high, symmetric=grid.symmetric, **limits)
    if grid.symmetric:
        zero_points = torch.zeros_like(zero_points)
    rounded = torch.round(ranges * (1.0 / scales)[:, None]) + zero_points[:, None]
    integers = rounded.clamp(grid.quant_min, grid.quant_max).to(torch.int8).reshape(count, -1)[:, :values]
    if grid.group < 0:
        scales, zero_points = scales.expand(count), zero_points.expand(count)
    return integers.contiguous(), scales.reshape(count, -1).clone(), zero_points.reshape(count, -1).to(torch.int8)


def store(integers: Tensor, grid: WeightGrid) -> Tensor:
    """Pack two values per byte if they fit into 4 bits.

    Args:
        integers: int8, shape ``(rows, values)``.
        grid: Their grid.

    Returns:
        int8 of the same shape, or uint8 of half as many columns.

    Example:
        >>> store(torch.tensor([[-7, 7, 1]], dtype=torch.int8), WeightGrid(-7, 7)).tolist()
        [[241, 137]]
    """
    if not grid.packs:
        return integers
    halves = (torch.nn.functional.pad(integers, (0, integers.shape[1] % 2)) + 8).to(torch.uint8)
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def restore(stored: Tensor, values: int, grid: WeightGrid) -> Tensor:
    """Inverse of `store`: int8 of shape ``(rows, values)``, padded with zeros to whole groups."""
    rows = stored
    if grid.packs:
        rows = torch.stack([stored & 15, stored >> 4], -1).reshape(stored.shape[0], -1).to(torch.int8) - 8
    padding = grid.padding(values)
    return torch.nn.functional.pad(rows[:, :values], (0, padding)) if padding else rows[:, :values]


def dequantize_rows(
    stored: Tensor, scales: Tensor, zero_points: Tensor | None, values: int, grid: WeightGrid
) -> Tensor:
    """Dequantize the result of `store` to float32 rows of shape ``(rows, values)``."""
    rows = restore(stored, values, grid).float()
    if grid.group > 0:
        rows = rows.reshape(rows.shape[0], -1, grid.group)
        scales, zero_points = scales[..., None], None if zero_points is None else zero_points[..., None]
    if zero_points is not None:
        rows = rows - zero_points.float()
    return (rows * scales).reshape(stored.shape[0], -1)[:, :values]
