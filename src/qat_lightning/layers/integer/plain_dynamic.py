"""Dynamic linear layers on grids without a kernel in PyTorch: ranges per token, scales per group of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_lightning.layers.integer.integer_layer import IntegerLayer
from qat_lightning.layers.integer.weights import WeightGrid, dequantize_rows, quantize_rows, store
from qat_lightning.numerics.dynamic_fake_quantize import DynamicGranularity, round_dynamically


class PlainDynamicLinear(IntegerLayer):
    """``nn.Linear`` with integer weights, packed two per byte from 4 bits down, and activations rounded in each call.

    It stores integers and computes in float32 with the values they represent: smaller in file and memory, but not
    faster.

    Args:
        in_features: Size of an input.
        out_features: Size of an output.
        bias: Whether there is a bias.
        grid: Grid of the weight, as the values of a `WeightGrid`.
        granularity: Which values of the activations share a range.
        symmetric: Whether the zero point of activations is 0.

    Attributes:
        integers: int8 buffer of shape ``(out_features, columns)``, or uint8 of half as many columns.
        scales: float32 buffer of shape ``(out_features, groups)``.
    """

    dequantizes = True

    op = "linear on dequantized weights, with activations on the grid of each call"
    integers: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        grid: tuple[int, int, bool, int, bool] = (-127, 127, True, 0, False),
        granularity: DynamicGranularity = "per_token",
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if granularity not in ("per_tensor", "per_token"):
            raise ValueError(f"{granularity!r} is not a granularity of activations")
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        self.granularity: DynamicGranularity = granularity
        self.symmetric = symmetric
        made = WeightGrid(*self.grid)
        if not made.symmetric:
            raise ValueError("the weight of a dynamic linear layer is symmetric")
        integers, scales = made.empty(out_features, in_features)
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        grid: WeightGrid,
        granularity: DynamicGranularity,
        symmetric: bool,
        share: Tensor | None = None,
    ) -> PlainDynamicLinear:
        """Quantize a weight of shape ``(out_features, in_features)``; ``share`` is passed to `quantize_rows`."""
        values = (grid.quant_min, grid.quant_max, grid.symmetric, grid.group, grid.clipped)
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, values, granularity, symmetric)
        integers, layer.scales, _ = quantize_rows(weight, grid, share)
        layer.integers = store(integers, grid)
        layer.bias = None if bias is None else bias.detach().float().clone()
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight that the integers represent, float32."""
        return dequantize_rows(self.integers, self.scales, None, self.in_features, WeightGrid(*self.grid))

    def forward(self, input: Tensor) -> Tensor:
        """Any float input of shape ``(..., in_features)``."""
        x = round_dynamically(input.float(), self.granularity, symmetric=self.symmetric)
        return F.linear(x, self.weight, self.bias)

    def reference(self, input: Tensor) -> Tensor:
        """The same computation in float64."""
        x = round_dynamically(input.float(), self.granularity, symmetric=self.symmetric)
        return F.linear(x.double(), self.weight.double(), None if self.bias is None else self.bias.double())

    def extra_repr(self) -> str:
        """Sizes and grids, for ``print``."""
        return f"{self.in_features}, {self.out_features}, grid={self.grid}, activations {self.granularity}"
