"""A FakeQuantize without a range of its own: the grid of a bias, which kernels add to products of two grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.grid import fake_quantize

Derive = Callable[[list[Any]], tuple[Tensor, Tensor]]
"""Scale and zero point of the grids of others, which it asks for by ``calculate_qparams()``."""


class DerivedFakeQuantize(nn.Module):
    """Rounds to a grid that is worked out from those of other FakeQuantizes, as long as these round.

    The arithmetic is in float32, as upstream's ``quantized_decomposed.quantize_per_channel`` has it; integers beyond
    2**24 are those that float32 has.

    Args:
        sources: The FakeQuantizes; they are no children of this one.
        derive: Of upstream's ``DerivedQuantizationSpec``.
        dtype: Of the integers, such as ``torch.int32``.
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
        self.sources = list(sources)  # a list, so that nothing of them is saved twice

    @property
    def seen(self) -> bool:
        """Whether the grids that it depends on are known, and are rounded to."""
        return all(source.seen and not source.left_float for source in self.sources)

    @torch.no_grad()
    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point: what training rounds with and convert reads."""
        return self.derive(list(self.sources))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, in its shape and dtype; as it is while a source does not round."""
        if not self.seen or not all(source.fake_quant_enabled for source in self.sources):
            return x
        scale, zero_point = self.calculate_qparams()
        axis = self.ch_axis if self.qscheme in (torch.per_channel_affine, torch.per_channel_symmetric) else None
        return fake_quantize(x, scale, zero_point, quant_min=self.quant_min, quant_max=self.quant_max, axis=axis)

    def extra_repr(self) -> str:
        """What it rounds to, for ``print(network)``."""
        return f"{self.dtype}, derived from {len(self.sources)} grids"
