"""The figures of one layer, as they are logged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qat_lightning.numerics.sqnr import EQUAL_DB


@dataclass(frozen=True)
class LayerFigures:
    """How quantization affects one layer or op; None where a figure does not apply or was not measured.

    Attributes:
        layer: Its name in the float network.
        kind: Its type.
        mode: The mode of its network.
        weight_bits: Bits of the weight.
        scale: Scale of the layer's activation.
        zero_point: Zero point of the layer's activation.
        low: Smallest value on the grid of the activation.
        high: Largest value.
        clipped_share: Share of the activation's values outside of these limits, from 0 to 1.
        dead_channels: Output channels whose weights all round to 0, or whose activation is constant.
        weight_sqnr_db: Weight against rounded weight, in dB.
        activation_sqnr_db: Activation against rounded activation, in dB.
        gradient_cut_share: Share of the activation's gradient, by absolute value, that the straight-through estimator
            cut off where the activation was clipped.
        weight_clipped_share: Share of the weight's values that were clipped.
        weight_gradient_cut_share: Share of the weight's gradient that was cut off where the weight was clipped.
        weight_scale_min: Smallest scale of the weight over its channels, or its single scale.
        weight_scale_max: Largest scale.
        weight_low: Smallest value on the grid of the weight in any channel.
        weight_high: Largest value.
        oscillating_share: Share of the weights that oscillate between two integers, if
            `qat_lightning.WeightOscillations` is used.
        frozen_share: Share of the weights that it has frozen.
    """

    layer: str
    kind: str
    mode: str
    weight_bits: int | None = None
    scale: float | None = None
    zero_point: int | None = None
    low: float | None = None
    high: float | None = None
    clipped_share: float | None = None
    dead_channels: int | None = None
    weight_sqnr_db: float | None = None
    activation_sqnr_db: float | None = None
    gradient_cut_share: float | None = None
    weight_clipped_share: float | None = None
    weight_gradient_cut_share: float | None = None
    weight_scale_min: float | None = None
    weight_scale_max: float | None = None
    weight_low: float | None = None
    weight_high: float | None = None
    oscillating_share: float | None = None
    frozen_share: float | None = None


def decibel(signal: float, noise: float) -> float | None:
    """A ratio of energies in dB, at most `EQUAL_DB`; None if the signal is zero or not finite.

    Example:
        >>> decibel(100.0, 1.0), decibel(1.0, 0.0), decibel(0.0, 0.0)
        (20.0, 300.0, None)
    """
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal <= 0:
        return None
    return EQUAL_DB if noise <= 0 else min(EQUAL_DB, 10 * math.log10(signal / noise))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 and math.isfinite(whole) and math.isfinite(part) else None


def weight_row(numbers: list[float], bits: int) -> dict[str, Any]:
    """The figures of a weight, from its sums in the probe's order."""
    signal, noise, clipped, gradient, cut, elements, scale_min, scale_max, _, low, high = numbers
    return {
        "weight_bits": bits,
        "weight_sqnr_db": decibel(signal, noise),
        "weight_clipped_share": _share(clipped, elements),
        "weight_gradient_cut_share": _share(cut, gradient),
        "weight_scale_min": scale_min,
        "weight_scale_max": scale_max,
        "weight_low": low,
        "weight_high": high,
    }


def activation_row(numbers: list[float]) -> dict[str, Any]:
    """The figures of an activation, from its sums in the probe's order."""
    signal, noise, clipped, gradient, cut, elements, scale, _, zero_point, low, high = numbers
    return {
        "scale": scale,
        "zero_point": int(zero_point),
        "low": low,
        "high": high,
        "clipped_share": _share(clipped, elements),
        "activation_sqnr_db": decibel(signal, noise),
        "gradient_cut_share": _share(cut, gradient),
    }
