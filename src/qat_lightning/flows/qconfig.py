"""The FakeQuantize of a recipe, as upstream's torch.ao code wants it: factories in a QConfig."""

from __future__ import annotations

import functools

import torch
from torch.ao.quantization import QConfig

from qat_lightning.fake_quantize import FakeQuantize
from qat_lightning.recipe import Recipe


def make_qconfig(recipe: Recipe) -> QConfig:
    """Activation and weight FakeQuantize as upstream's torch.ao code wants them: factories in a QConfig."""
    scheme, target = recipe.scheme, recipe.target
    low, high = target.activation_limits
    activation = functools.partial(
        FakeQuantize,
        dtype=torch.quint8 if target.activation_dtype is torch.uint8 else torch.qint8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_symmetric if scheme.activation_symmetric else torch.per_tensor_affine,
        averaging_constant=scheme.averaging_constant,
    )
    weight = functools.partial(
        FakeQuantize,
        dtype=torch.qint8,
        quant_min=-recipe.weight_quant_max,
        quant_max=recipe.weight_quant_max,
        qscheme=torch.per_channel_symmetric if scheme.per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if scheme.per_channel else -1,
        source="present",
    )
    return QConfig(activation=activation, weight=weight)
