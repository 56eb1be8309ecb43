"""The integer grid that values are rounded to, independent of the range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat_lightning.numerics.grid import choose_qparams, fake_quantize, smallest_and_largest

_STORAGE = {torch.uint8: torch.quint8, torch.int8: torch.qint8, torch.quint8: torch.quint8, torch.qint8: torch.qint8}


@dataclass(frozen=True)
class IntegerGrid:
    """The integers of a grid, and how they relate to 0.

    Attributes:
        dtype: ``torch.uint8`` or ``torch.int8``: the integers that the kernel stores.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        qscheme: One of torch's four.
        ch_axis: Channel dimension of a per-channel scheme, else -1.

    Example:
        >>> grid = IntegerGrid(torch.uint8, 0, 255, torch.per_tensor_affine)
        >>> scale, zero_point = grid.qparams(torch.tensor(-1.0), torch.tensor(1.55))
        >>> round(float(scale), 4), int(zero_point), grid.axis, str(grid)
        (0.01, 100, None, 'uint8 [0, 255], affine, per tensor')
    """

    dtype: torch.dtype
    quant_min: int
    quant_max: int
    qscheme: torch.qscheme
    ch_axis: int = -1

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is in the middle of the grid."""
        return self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)

    @property
    def per_channel(self) -> bool:
        """Whether each channel has its own scale."""
        return self.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)

    @property
    def axis(self) -> int | None:
        """The channel dimension if scales are per channel; otherwise None."""
        return self.ch_axis if self.per_channel else None

    @property
    def largest(self) -> float:
        """The end of the largest range: the integers of its grid, half a step or a step beyond it, are float32."""
        half = max(1, (self.quant_max - self.quant_min) // 2)
        return float(torch.finfo(torch.float32).max * half / (half + 2))

    @property
    def storage_dtype(self) -> torch.dtype:
        """The quantized dtype of the same integers: ``torch.quint8`` or ``torch.qint8``."""
        return _STORAGE[self.dtype]

    def ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value, per channel if scales are per channel."""
        return smallest_and_largest(values, self.axis)

    def by_channel(self, values: Tensor) -> Tensor:
        """Values in two dimensions, one row per scale."""
        return values.movedim(self.ch_axis, 0).flatten(1) if self.per_channel else values.reshape(1, -1)

    def qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a range; see `choose_qparams`."""
        return choose_qparams(low, high, quant_min=self.quant_min, quant_max=self.quant_max, symmetric=self.symmetric)

    def round(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, *, clamps: bool = True, relu: float | None = None
    ) -> Tensor:
        """Values on the grid; see `fake_quantize`."""
        middle = self.quant_min + (self.quant_max - self.quant_min + 1) // 2
        return fake_quantize(
            x,
            scale,
            middle if self.symmetric else zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            axis=self.axis,
            clamps=clamps,
            relu=relu,
        )

    @torch.no_grad()
    def folded_ends(self, weight: Tensor, factor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """The range of ``weight * factor``, without computing that product: rounding to float32 is monotonic."""
        ends = [end.float() * factor for end in smallest_and_largest(weight, axis)]
        low, high = torch.minimum(*ends), torch.maximum(*ends)
        return (low, high) if self.per_channel else (low.amin(), high.amax())

    def __str__(self) -> str:
        """For ``print(network)``."""
        integers = f"{str(self.dtype).removeprefix('torch.')} [{self.quant_min}, {self.quant_max}]"
        where = f"per channel {self.ch_axis}" if self.per_channel else "per tensor"
        return f"{integers}, {'symmetric' if self.symmetric else 'affine'}, {where}"
