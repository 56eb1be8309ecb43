"""Signal-to-quantization-noise ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qat_lightning.errors import ConfigurationError

EQUAL_DB = 300.0
"""Logged for the SQNR of equal outputs; the noise of float64 arithmetic itself is at about 310 dB."""


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics for loggers and JSON: infinite SQNR becomes `EQUAL_DB`; what else is not finite is left out.

    Example:
        >>> finite({"int8/sqnr_db": math.inf, "val/f1": math.nan, "val/perplexity": math.inf, "val/acc": 0.5})
        {'int8/sqnr_db': 300.0, 'val/acc': 0.5}
    """
    known = {
        key: math.copysign(EQUAL_DB, value) if "sqnr" in key and math.isinf(value) else value
        for key, value in metrics.items()
    }
    return {key: value for key, value in known.items() if math.isfinite(value)}


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """Compute the signal-to-quantization-noise ratio: the energy of the reference over that of the difference.

    Computes in float64, so that 140 dB between float32 tensors can be told from 130.

    Args:
        reference: The expected output. Quantized tensors are dequantized.
        actual: The actual output, of the same shape.

    Returns:
        The ratio in dB. Infinity where the two are equal (also where both are empty or zero), minus infinity where
        the reference is all zero and the actual is not, NaN where one of them holds NaN or infinity.

    Raises:
        ConfigurationError: If the shapes differ.

    Example:
        >>> round(sqnr_db(torch.tensor([10.0, 0.0]), torch.tensor([10.0, 1.0])), 3)
        20.0
        >>> sqnr_db(torch.ones(2), torch.ones(2))
        inf
    """
    signal, noise = energies(reference.detach().cpu(), actual.detach().cpu())
    return float(decibel(signal, noise))


def energies(reference: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """The energies of a signal and of its difference, as float64 scalars."""
    refuse_other_shape(reference, actual)
    signal, other = (dequantized(tensor).to(torch.float64) for tensor in (reference, actual))
    return signal.square().sum(), (signal - other).square().sum()


def decibel(signal: Tensor, noise: Tensor) -> Tensor:
    """Ten times the logarithm of a ratio of energies; inf where there is no noise."""
    # 0/0 would be NaN, but two all-zero tensors are equal like any others. A NaN or infinite signal stays NaN.
    ratio = torch.where((noise == 0) & signal.isfinite(), torch.full_like(signal, math.inf), signal / noise)
    return 10 * ratio.log10()


def refuse_other_shape(reference: Tensor, actual: Tensor) -> None:
    """Raise an error if two outputs have different shapes.

    Raises:
        ConfigurationError: The shapes differ.
    """
    if reference.shape != actual.shape:
        raise ConfigurationError(
            f"the reference has the shape {tuple(reference.shape)} and the actual output {tuple(actual.shape)}: give "
            "two outputs of the same shape, for the same batch."
        )


def dequantized(tensor: Tensor) -> Tensor:
    """A float tensor; a quantized one is dequantized."""
    return tensor.dequantize() if tensor.is_quantized else tensor
