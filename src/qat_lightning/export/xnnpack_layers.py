"""Per-token dynamic linear layers in the ops that ExecuTorch's XNNPACK delegate runs as one kernel.

These are torchao's ops (``choose_qparams_affine``, ``quantize_affine``, ``dequantize_affine``), as its
``Int8DynamicActivationIntxWeightConfig`` exports them, with the integers and scales of the network.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.export.plain_layers import plain_integer_layer
from qat_lightning.layers.integer import IntegerLayer, WeightGrid
from qat_lightning.layers.integer.plain_dynamic import PlainDynamicLinear
from qat_lightning.layers.integer.weights import restore
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

SMALLEST_GROUP = 32
"""Smallest group size of weights in XNNPACK's kernels."""


class XnnpackLinear(nn.Module):
    """`PlainDynamicLinear` with per-token activations.

    Args:
        layer: The layer; its activations are affine and per-token.
    """

    integers: Tensor
    scales: Tensor
    zero_points: Tensor
    bias: Tensor | None

    def __init__(self, layer: PlainDynamicLinear) -> None:
        super().__init__()
        import torchao.quantization.quant_primitives  # noqa: F401 (registers torchao's ops)

        grid = WeightGrid(*layer.grid)
        integers = restore(layer.integers, layer.in_features, grid)
        # The kernels distinguish 4 from 8 bits by the limits.
        self.limits = (-8, 7) if grid.packs else (-128, 127)
        self.group = grid.group if grid.group > 0 else 0
        self.padding = integers.shape[1] - layer.in_features if self.group else 0
        self.register_buffer("integers", integers if self.group else integers[:, : layer.in_features].contiguous())
        self.register_buffer("scales", layer.scales if self.group else layer.scales[:, 0].clone())
        zero_type = torch.int8 if self.group else torch.int64
        self.register_buffer("zero_points", torch.zeros_like(self.scales, dtype=zero_type))
        self.register_buffer("bias", layer.bias)

    def weight(self) -> Tensor:
        """The dequantized weight, computed by ops."""
        kept = (self.scales, self.zero_points)
        if self.group:
            block = [1, self.group]
            made = torch.ops.torchao.dequantize_affine(self.integers, block, *kept, torch.int8, *self.limits)
        else:
            ops = torch.ops.quantized_decomposed
            made = ops.dequantize_per_channel.default(self.integers, *kept, 0, *self.limits, torch.int8)
        weight: Tensor = made
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """Accept any float input of shape ``(..., in_features)``."""
        ops, x = torch.ops.torchao, input.float()
        if self.padding:
            x = F.pad(x, (0, self.padding))  # zeros, which every range includes
        block = [1] * (x.dim() - 1) + [x.shape[-1]]
        qparams = ops.choose_qparams_affine(
            x, "ASYMMETRIC", block, torch.int8, -128, 127, torch.finfo(torch.float32).eps, torch.float32, torch.int8
        )
        integers = ops.quantize_affine(x, block, *qparams, torch.int8, -128, 127)
        rounded = ops.dequantize_affine(integers, block, *qparams, torch.int8, -128, 127)
        return F.linear(rounded, self.weight(), self.bias)


def for_xnnpack(layer: IntegerLayer, name: str) -> nn.Module:
    """The `Spelling` of ExecuTorch.

    Raises:
        ExportError: This type of layer is not supported.
    """
    return XnnpackLinear(layer) if isinstance(layer, PlainDynamicLinear) else plain_integer_layer(layer, name)


def refuse_grids(recipe: Recipe) -> str:
    """Return why XNNPACK has no kernel for a dynamic scheme, and what to use; empty if it has one."""
    return next((why for own in recipe.each if (why := _refuse_grids(own.scheme))), "")


def _refuse_grids(scheme: Scheme) -> str:
    if scheme.activation_granularity != "per_token":
        return (
            "XNNPACK computes the range of activations for each token: use a scheme of "
            "activation_granularity='per_token'."
        )
    if scheme.activation_symmetric:
        return "XNNPACK's ranges of tokens are affine: use a scheme of activation_symmetric=False."
    grouped = scheme.weight_granularity == "per_group"
    if grouped and scheme.weight_bits > 4:
        return (
            "XNNPACK supports scales for groups of weights at 4 bits only: use a scheme of weight_bits=4, or "
            "weight_granularity='per_channel'."
        )
    if grouped and scheme.weight_group_size < SMALLEST_GROUP:
        return f"XNNPACK needs groups of {SMALLEST_GROUP} weights or more: use weight_group_size={SMALLEST_GROUP}."
    return ""
