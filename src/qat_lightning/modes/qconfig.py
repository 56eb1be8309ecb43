"""The FakeQuantizes of a recipe as a QConfig, for upstream's torch.ao code."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.ao.quantization import QConfig

from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme


def make_qconfig(recipe: Recipe) -> QConfig:
    """Factories of the activation and weight FakeQuantize, as a QConfig for upstream's torch.ao code."""
    scheme = recipe.scheme
    activation_low, activation_high = recipe.activation_limits
    weight_low, weight_high = recipe.weight_limits
    activation = functools.partial(
        FakeQuantize,
        dtype=torch.quint8 if recipe.target.activation_dtype is torch.uint8 else torch.qint8,
        quant_min=activation_low,
        quant_max=activation_high,
        qscheme=activation_qscheme(recipe),
        **activation_settings(recipe),
    )
    weight = functools.partial(
        FakeQuantize,
        dtype=torch.qint8,
        quant_min=weight_low,
        quant_max=weight_high,
        qscheme=weight_qscheme(scheme),
        ch_axis=0 if scheme.per_channel else -1,
        **weight_settings(recipe),
    )
    return QConfig(activation=activation, weight=weight)


def table_fake_quantize(recipe: Recipe) -> FakeQuantize:
    """The FakeQuantize of an embedding's table, whose integers are not limited by an int8 kernel."""
    low, high = recipe.weight_limits
    if recipe.scheme.weight_symmetric:
        low, high = -recipe.scheme.weight_quant_max, recipe.scheme.weight_quant_max
    made: FakeQuantize = make_qconfig(recipe).weight(quant_min=low, quant_max=high)
    return made


def activation_qscheme(recipe: Recipe) -> torch.qscheme:
    """Symmetric or affine, as torch names it."""
    symmetric = recipe.scheme.activation_symmetric or recipe.target.symmetric
    return torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine


def weight_qscheme(scheme: Scheme) -> torch.qscheme:
    """Symmetric or affine, per channel or per tensor, as torch names it."""
    if scheme.per_channel:
        return torch.per_channel_symmetric if scheme.weight_symmetric else torch.per_channel_affine
    return torch.per_tensor_symmetric if scheme.weight_symmetric else torch.per_tensor_affine


def activation_settings(recipe: Recipe) -> dict[str, Any]:
    """Arguments of an activation's FakeQuantize besides its grid."""
    return {
        "source": recipe.activation_observer,
        "averaging_constant": recipe.scheme.averaging_constant,
        "percentile": recipe.scheme.activation_percentile,
        "learned": recipe.scheme.learned_step,
        "learned_rate": recipe.scheme.learned_rate,
    }


def weight_settings(recipe: Recipe) -> dict[str, Any]:
    """Arguments of a weight's FakeQuantize besides its grid."""
    return {
        "source": "present",
        "clipped": recipe.scheme.chosen_weight_observer == "mse",
        "learned": recipe.scheme.learned_step,
        "learned_rate": recipe.scheme.learned_rate,
    }
