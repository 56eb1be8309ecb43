"""The choice of AdaRound between the two grid points around each weight of a layer.

Nagel et al., 2020, https://arxiv.org/abs/2004.10568, equations 22 and 23.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.recipes.layers import RoundedLayer

_LOW, _HIGH = -0.1, 1.1
"""The sigmoid is stretched to this interval and clipped to [0, 1], so that it reaches both ends."""


class Rounding:
    """The weight of one layer, with a variable for each value that moves it between its lower and upper grid point.

    Args:
        layer: The layer; its present weight is used.

    Attributes:
        folded: The folded weight before rounding, float32.
        nearest: The weight rounded to nearest.
        scale: Scale of the grid, shaped to broadcast with the weight.
        fixed: Whether a value is not learned: values at the ends of the grid determine it.
        variable: The variable that is learned, of the shape of the weight; initially it represents the present weight.
    """

    def __init__(self, layer: RoundedLayer) -> None:
        self.folded = layer.folded()
        self.nearest = layer.rounded()
        fq = layer.fq
        shape = [1] * self.folded.dim()
        if fq.per_channel:
            shape[fq.ch_axis] = -1
        scale, zero_point = fq.calculate_qparams()
        self.scale = scale.reshape(shape)
        position = self.folded / self.scale
        self.floor = position.floor()
        low, high = fq.quant_min - zero_point.reshape(shape), fq.quant_max - zero_point.reshape(shape)
        self.low, self.high = low, high
        # Values at the ends determine the range and so the grid; they stay, and so do values that would exceed the
        # ends.
        least, most = self._ends(fq)
        past = (self.floor * self.scale < least - 1e-5 * most.abs()) | (
            (self.floor + 1) * self.scale > most + 1e-5 * most.abs()
        )
        self.fixed = past | (position >= high - 0.5) | (position <= low + 0.5)
        self.fixed |= (self.folded == least) | (self.folded == most)
        share = (position - self.floor).clamp(1e-4, 1 - 1e-4)
        self.variable = -torch.log((_HIGH - _LOW) / (share - _LOW) - 1)

    def _ends(self, fq: FakeQuantize) -> tuple[Tensor, Tensor]:
        """The smallest and largest weight of each grid, which determine its range."""
        channel = fq.ch_axis % self.folded.dim() if fq.per_channel else None
        axes = [axis for axis in range(self.folded.dim()) if axis != channel]
        least, most = self.folded.amin(axes, keepdim=True), self.folded.amax(axes, keepdim=True)
        if fq.symmetric:
            most = torch.maximum(-least, most)
            return -most, most
        return least.clamp(max=0.0), most.clamp(min=0.0)

    def share(self, variable: Tensor) -> Tensor:
        """The rectified sigmoid, equation 23: 0 for down, 1 for up."""
        return (torch.sigmoid(variable) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def weight(self, share: Tensor) -> Tensor:
        """The weight with each value between its two grid points."""
        values = (self.floor + share).clamp(self.low, self.high) * self.scale
        return torch.where(self.fixed, self.nearest, values)

    def final(self, variable: Tensor) -> Tensor:
        """The weight to store: grid points, and unchanged values at the ends."""
        values = self.weight((self.share(variable) >= 0.5).to(self.folded.dtype))
        return torch.where(self.fixed, self.folded, values)
