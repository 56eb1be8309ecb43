"""The arithmetic of quantization: scale and zero point of a range, and rounding to the resulting grid.

There is one formula for scale and zero point. Training rounds with it and conversion reads it, so a kernel computes
with the same integers as training. (Upstream's fused fake-quantize trains on one grid and converts with
another: https://github.com/pytorch/pytorch/blob/main/torch/ao/quantization/fake_quantize.py.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_lightning.numerics.rounding import Round, RoundFolded, RoundLearned, RoundWithin, is_near, round_on_gpu

EPS = float(torch.finfo(torch.float32).eps)
"""The smallest scale of a range other than [0, 0]."""


def choose_qparams(
    min_val: Tensor, max_val: Tensor, *, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for a range, by the affine or the symmetric formula of Jacob et al., 2018, section 2.1.

    Affine: ``scale = (max - min) / (quant_max - quant_min)`` with the range widened to hold 0, and
    ``zero_point = quant_min - round(min / scale)``, so that 0 is represented exactly. Symmetric:
    ``scale = max(|min|, |max|) / ((quant_max - quant_min) // 2)`` and the zero point in the middle of the grid.

    Args:
        min_val: Smallest value to represent, float32, shape ``()`` or ``(channels,)``.
        max_val: Largest value, of the same shape.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        symmetric: Which of the two formulas to use.

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
    # Quotients first: the difference of the ends of a range over all of float32 would overflow.
    scale = _positive(high / steps - low / steps, steps)
    zero_point = quant_min - torch.round(low / scale)
    return scale, zero_point.clamp(quant_min, quant_max).to(torch.int32)


def _positive(scale: Tensor, steps: int) -> Tensor:
    """A scale that kernels can divide by: at least `EPS`, and that of the range [0, 1] for an all-zero tensor.

    Zeros can be represented with any scale, but a tiny one would overflow an int32 bias, or the ratios that QNNPACK
    allows.
    """
    return torch.where(scale > 0, scale.clamp(min=EPS), 1.0 / steps)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    clamps: bool = True,
    relu: float | None = None,
) -> Tensor:
    """Round ``x`` to the grid and back; the gradient passes straight through where ``x`` was not clamped.

    Straight-through estimator of Bengio et al., 2013. Computes in float32 for any dtype of ``x`` and under autocast
    (which does not cast the ops used here); the result has the dtype of ``x``. Values and gradients are bit-equal to
    those of ``torch.fake_quantize_per_tensor_affine`` and ``torch.fake_quantize_per_channel_affine``, but no mask of
    clamped values is kept: the backward pass recomputes it from ``x``.

    Args:
        x: Values of any shape and floating dtype.
        scale: float32, shape ``()``, or ``(x.shape[axis],)``.
        zero_point: int32, of the shape of ``scale``; or one Python number for all, which then need not be read from the
            tensor.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        axis: The channel dimension of ``x``; None for one scale.
        clamps: Pass False if no value can round to an integer beyond the grid, as for a weight on its own symmetric
            range.
        relu: Upper limit of a ReLU on ``x`` that is fused into the rounding: 6 for ReLU6, inf for ReLU. Values and
            gradient are those of ``fake_quantize(relu(x))``.

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
    if relu is not None and (axis is not None or x.device.type != "cpu"):
        x, relu = relu_up_to(x, relu), None
    values = x.float()
    if not clamps:
        rounded: Tensor = RoundWithin.apply(values, along(scale, x, axis))  # type: ignore[no-untyped-call]
        return rounded.to(x.dtype)
    if x.device.type != "cpu" and not torch.compiler.is_compiling():
        return round_on_gpu(values, scale, zero_point, quant_min, quant_max, axis).to(x.dtype)
    if isinstance(zero_point, Tensor) and axis is None and is_near(x):
        zero_point = int(zero_point)
    low: Any = quant_min - zero_point
    high: Any = quant_max - zero_point
    if isinstance(zero_point, Tensor):
        low, high = along(low, x, axis).float(), along(high, x, axis).float()
    rounded = Round.apply(values, along(scale, x, axis), low, high, relu)  # type: ignore[no-untyped-call]
    return rounded.to(x.dtype)


def round_within_half_a_step(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, *, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """`fake_quantize` for a grid made from the range of ``x`` itself, with gradient 1 everywhere.

    Such a grid clamps by at most half a step, where rounding the zero point shifted an end of the grid. That is no more
    than rounding itself, so no value counts as out of range, and the backward pass does not need ``x``.

    Args:
        x: Values of any shape and floating dtype.
        scale: float32, shape ``()``, or ``(x.shape[axis],)``.
        zero_point: int32, of the shape of ``scale``; or 0 for a symmetric grid, which clamps nothing at all.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        axis: The channel dimension of ``x``; None for one scale.
    """
    low: Any = None
    high: Any = None
    if isinstance(zero_point, Tensor):
        low, high = quant_min - zero_point, quant_max - zero_point
        if axis is None and is_near(x):
            low, high = int(low), int(high)  # clamping to tensors is several times slower
        else:
            low, high = along(low, x, axis).float(), along(high, x, axis).float()
    rounded: Tensor = RoundWithin.apply(x.float(), along(scale, x, axis), low, high)  # type: ignore[no-untyped-call]
    return rounded.to(x.dtype)


def relu_up_to(x: Tensor, largest: float) -> Tensor:
    """ReLU with an upper limit: 6 for ReLU6, inf for plain ReLU.

    Example:
        >>> relu_up_to(torch.tensor([-1.0, 2.0, 9.0]), 6.0)
        tensor([0., 2., 6.])
    """
    return F.relu(x) if math.isinf(largest) else F.hardtanh(x, 0.0, largest)


def fake_quantize_folded(weight: Tensor, factor: Tensor, scale: Tensor, *, axis: int) -> Tensor:
    """Round ``weight * factor`` to its own symmetric range and divide by ``factor``; the gradient passes through.

    Args:
        weight: A weight of any floating dtype.
        factor: The factor by which BatchNorm folding multiplies each output channel, float32, shape ``(channels,)``.
            Where it is 0, or so small that dividing by it overflows, the result is the weight itself.
        scale: Scale of ``weight * factor``, float32, shape ``()`` or ``(channels,)``.
        axis: Dimension of the output channels.
    """
    factor, scale = along(factor, weight, axis), along(scale, weight, axis)
    unfold = scale / factor
    dead = unfold.isinf()
    rounded: Tensor = RoundFolded.apply(weight.float(), factor, 1.0 / scale, unfold)  # type: ignore[no-untyped-call]
    if not is_near(weight) or bool(dead.any()):
        rounded = torch.where(dead, weight.float(), rounded)
    return rounded.to(weight.dtype)


def along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Reshape per-channel values to broadcast with ``x``; a single value is returned as it is.

    Args:
        values: Shape ``()`` or ``(channels,)``.
        x: The tensor; its dimension ``axis`` is the channels.
        axis: The dimension; None for one value.
    """
    if axis is None or values.dim() == 0:
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def smallest_and_largest(values: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The ends of the range of all values, or of each channel; NaN where a value is NaN.

    Args:
        values: At least one value, in any memory format.
        axis: The channel dimension; None for all values together.
    """
    others = [] if axis is None else [dim for dim in range(values.dim()) if dim != axis % values.dim()]
    if axis is not None and not others:
        return values, values
    if values.device.type == "cpu" or axis is not None:
        # Two vectorized passes: `torch.aminmax` is 1.5 times slower for all values, and 30 times for channels.
        return values.amin(others), values.amax(others)
    low, high = torch.aminmax(values)
    return low, high


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """`fake_quantize` with gradients for scale and zero point: learned step size.

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
    scale, zero_point = along(scale, x, axis), along(zero_point, x, axis)
    rounded: Tensor = RoundLearned.apply(x.float(), scale, zero_point, quant_min, quant_max)  # type: ignore[no-untyped-call]
    return rounded.to(x.dtype)
