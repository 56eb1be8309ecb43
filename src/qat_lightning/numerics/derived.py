"""A FakeQuantize without a range of its own, for biases: their grid follows from those of input and weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.grid import fake_quantize

Derive = Callable[[list[Any]], tuple[Tensor, Tensor]]
"""Computes scale and zero point from other FakeQuantizes, by their ``calculate_qparams()``."""


class DerivedFakeQuantize(nn.Module):
    """Rounds to a grid that is derived from other FakeQuantizes, while these round.

    Computes in float32, as upstream's ``quantized_decomposed.quantize_per_channel`` does; integers beyond 2**24 are
    rounded to those that float32 represents.

    Args:
        sources: The FakeQuantizes; not registered as children.
        derive: The function of upstream's ``DerivedQuantizationSpec``.
        dtype: Integer dtype, such as ``torch.int32``.
        quant_min: Smallest integer; None for that of the dtype.
        quant_max: Largest integer; None for that of the dtype.
        qscheme: One of torch's four; None for ``torch.per_tensor_affine``.
        ch_axis: Channel dimension of a per-channel scheme, else None.

    Example:
        >>> source = FakeQuantize(dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_symmetric)
        >>> _ = source(torch.tensor([-1.27, 1.27]))
        >>> bias = DerivedFakeQuantize([source], lambda grids: grids[0].calculate_qparams(), dtype=torch.int32)
        >>> bias(torch.tensor([0.503]))
        tensor([0.5000])
    """

    def __init__(
        self,
        sources: Sequence[FakeQuantize],
        derive: Derive,
        *,
        dtype: torch.dtype,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        ch_axis: int | None = None,
    ) -> None:
        super().__init__()
        info = torch.iinfo(dtype)
        self.dtype = dtype
        self.quant_min = info.min if quant_min is None else quant_min
        self.quant_max = info.max if quant_max is None else quant_max
        self.qscheme = torch.per_tensor_affine if qscheme is None else qscheme
        self.ch_axis = -1 if ch_axis is None else ch_axis
        self.is_dynamic = False
        self.derive = derive
        self.sources = list(sources)  # a list, so that they are not registered and saved twice

    @property
    def seen(self) -> bool:
        """Whether the grids that it is derived from are known, and their FakeQuantizes round."""
        return all(source.seen and not source.left_float for source in self.sources)

    @torch.no_grad()
    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point, used by training and read by conversion."""
        return self.derive(list(self.sources))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, in its shape and dtype; ``x`` itself while a source does not round."""
        if not self.seen or not all(source.fake_quant_enabled for source in self.sources):
            return x
        scale, zero_point = self.calculate_qparams()
        axis = self.ch_axis if self.qscheme in (torch.per_channel_affine, torch.per_channel_symmetric) else None
        return fake_quantize(x, scale, zero_point, quant_min=self.quant_min, quant_max=self.quant_max, axis=axis)

    def extra_repr(self) -> str:
        """The grid, for ``print(network)``."""
        return f"{self.dtype}, derived from {len(self.sources)} grids"
