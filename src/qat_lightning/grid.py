"""The arithmetic of quantization: scale and zero point of a range, and rounding to the grid they make.

There is one formula for scale and zero point. Training rounds with it and conversion reads it, so that the integers a
kernel sees are the integers that training saw. (Upstream's fused fake-quantize trains on one grid and converts with
another: https://github.com/pytorch/pytorch/blob/main/torch/ao/quantization/fake_quantize.py.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS = float(torch.finfo(torch.float32).eps)
"""The smallest scale of a range that is not 0."""


def choose_qparams(
    min_val: Tensor, max_val: Tensor, *, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for a range, by the affine or the symmetric formula of Jacob et al., 2018, section 2.1.

    Affine: ``scale = (max - min) / (quant_max - quant_min)`` with the range widened to hold 0, and
    ``zero_point = quant_min - round(min / scale)``, so that 0 is exactly representable. Symmetric:
    ``scale = max(|min|, |max|) / ((quant_max - quant_min) // 2)`` and the zero point in the middle of the grid.

    Args:
        min_val: Smallest value to represent, float32, shape ``()`` or ``(channels,)``.
        max_val: Largest value, of the same shape.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        symmetric: Which of the two formulas.

    Returns:
        Scale (float32) and zero point (int32), of the shape of ``min_val``.

    Example:
        >>> scale, zero_point = choose_qparams(
        ...     torch.tensor(-1.0), torch.tensor(1.55), quant_min=0, quant_max=255, symmetric=False
        ... )
        >>> round(scale.item(), 4), zero_point.item()
        (0.01, 100)
    """
    low, high = min_val.float().clamp(max=0.0), max_val.float().clamp(min=0.0)
    steps = quant_max - quant_min
    if symmetric:
        half = steps // 2
        scale = _positive(torch.maximum(-low, high) / half, half)
        middle = quant_min + (steps + 1) // 2
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    # The quotients first: a range that reaches from one end of float32 to the other has no difference in float32.
    scale = _positive(high / steps - low / steps, steps)
    zero_point = quant_min - torch.round(low / scale)
    return scale, zero_point.clamp(quant_min, quant_max).to(torch.int32)


def _positive(scale: Tensor, steps: int) -> Tensor:
    """A scale that kernels can divide by: at least `EPS`, and that of the range [0, 1] for a tensor of zeros.

    Any scale represents zeros; a tiny one would overflow the integers of a bias, or the ratios that QNNPACK allows.
    """
    return torch.where(scale > 0, scale.clamp(min=EPS), 1.0 / steps)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """Round ``x`` to the grid and back; the gradient passes straight through where ``x`` was not clamped.

    Straight-through estimator of Bengio et al., 2013. Arithmetic is in float32 whatever the dtype of ``x`` and whatever
    autocast says; the result has the dtype of ``x``.

    Args:
        x: Values of any shape and floating dtype.
        scale: float32, shape ``()``, or ``(x.shape[axis],)``.
        zero_point: int32, of the shape of ``scale``.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        axis: The channel dimension of ``x``; None for one scale.

    Example:
        >>> fake_quantize(
        ...     torch.tensor([0.26, 9.0]),
        ...     torch.tensor(0.1),
        ...     torch.tensor(0, dtype=torch.int32),
        ...     quant_min=-127,
        ...     quant_max=127,
        ... )
        tensor([0.3000, 9.0000])
    """
    with torch.autocast(x.device.type, enabled=False):
        values = x.float()
        if axis is None and values.device.type == "cpu":
            rounded = _round_on_cpu(values, scale, zero_point, quant_min, quant_max)
        elif axis is None:
            rounded = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, quant_min, quant_max)
        else:
            rounded = torch.fake_quantize_per_channel_affine(values, scale, zero_point, axis, quant_min, quant_max)
        return rounded.to(x.dtype)


def smallest_and_largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.aminmax` of a whole tensor, which copies one that is not contiguous, and takes seven times as long."""
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    low, high = torch.aminmax(values)
    return low, high


class _RoundOnCpu(torch.autograd.Function):
    """``torch.fake_quantize_per_tensor_affine``, bit for bit, in vectorized passes.

    Its own kernel for CPUs keeps a mask of bytes: forward and backward take five times as long, more than the
    convolutions between them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = (low - 0.5) * scale, (high + 0.5) * scale
        # The reciprocal in float32, as the kernel has it; low and high are seen from the zero point.
        return (x * (1.0 / torch.tensor(scale))).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        # The gradient passes where the value was not clamped.
        return torch.ops.aten.hardtanh_backward(gradient, x, *ctx.limits), None, None, None


def _round_on_cpu(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    low, high = quant_min - int(zero_point), quant_max - int(zero_point)
    rounded: Tensor = _RoundOnCpu.apply(x, float(scale), low, high)  # type: ignore[no-untyped-call]
    return rounded


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """`fake_quantize` with a gradient for scale and zero point: learned step size.

    Esser et al., 2020, equation 3, and Bhalgat et al., 2020, equations 5 and 6. The values are those of `fake_quantize`
    with the zero point rounded.

    Args:
        x: Values of any shape and floating dtype.
        scale: float32 parameter, positive, shape ``()``, or ``(x.shape[axis],)``.
        zero_point: float32, of the shape of ``scale``.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        axis: The channel dimension of ``x``; None for one scale.
    """
    with torch.autocast(x.device.type, enabled=False):
        values = x.float()
        if axis is None:
            rounded = torch._fake_quantize_learnable_per_tensor_affine(
                values, scale.reshape(1), zero_point.reshape(1), quant_min, quant_max, 1.0
            )
        else:
            rounded = torch._fake_quantize_learnable_per_channel_affine(
                values, scale, zero_point, axis, quant_min, quant_max, 1.0
            )
        return rounded.to(x.dtype)
