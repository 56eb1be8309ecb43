"""The arithmetic of quantization: scale and zero point of a range, and rounding to the resulting grid.

There is one formula for scale and zero point. Training rounds with it and conversion reads it, so a kernel computes
with the same integers as training. (Upstream's fused fake-quantize trains on one grid and converts with
another: https://github.com/pytorch/pytorch/blob/main/torch/ao/quantization/fake_quantize.py.)
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
        rounded: Tensor = _RoundWithin.apply(values, along(scale, x, axis))  # type: ignore[no-untyped-call]
        return rounded.to(x.dtype)
    if x.device.type != "cpu" and not torch.compiler.is_compiling():
        return _round_on_gpu(values, scale, zero_point, quant_min, quant_max, axis).to(x.dtype)
    if isinstance(zero_point, Tensor) and axis is None and _is_near(x):
        zero_point = int(zero_point)
    low: Any = quant_min - zero_point
    high: Any = quant_max - zero_point
    if isinstance(zero_point, Tensor):
        low, high = along(low, x, axis).float(), along(high, x, axis).float()
    rounded = _Round.apply(values, along(scale, x, axis), low, high, relu)  # type: ignore[no-untyped-call]
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
        if axis is None and _is_near(x):
            low, high = int(low), int(high)  # clamping to tensors is several times slower
        else:
            low, high = along(low, x, axis).float(), along(high, x, axis).float()
    rounded: Tensor = _RoundWithin.apply(x.float(), along(scale, x, axis), low, high)  # type: ignore[no-untyped-call]
    return rounded.to(x.dtype)


def relu_up_to(x: Tensor, largest: float) -> Tensor:
    """ReLU with an upper limit: 6 for ReLU6, inf for plain ReLU.

    Example:
        >>> relu_up_to(torch.tensor([-1.0, 2.0, 9.0]), 6.0)
        tensor([0., 2., 6.])
    """
    return F.relu(x) if math.isinf(largest) else F.hardtanh(x, 0.0, largest)


def _is_near(x: Tensor) -> bool:
    """Whether reading a value is cheap: it would synchronize a GPU and break a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def fake_quantize_folded(weight: Tensor, factor: Tensor, scale: Tensor, *, axis: int) -> Tensor:
    """Round ``weight * factor`` to its own symmetric range and divide by ``factor``; the gradient passes through.

    Args:
        weight: Of any floating dtype.
        factor: The factor by which BatchNorm folding multiplies each output channel, float32, shape ``(channels,)``.
            Where it is 0, the result is the weight itself.
        scale: Scale of ``weight * factor``, float32, shape ``()`` or ``(channels,)``.
        axis: Dimension of the output channels.
    """
    factor, scale = along(factor, weight, axis), along(scale, weight, axis)
    dead = factor == 0
    unfold = scale / torch.where(dead, 1.0, factor)
    rounded: Tensor = _RoundFolded.apply(weight.float(), factor, 1.0 / scale, unfold)  # type: ignore[no-untyped-call]
    if not _is_near(weight) or bool(dead.any()):
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


class _Round(torch.autograd.Function):
    """``torch.fake_quantize_per_{tensor,channel}_affine``, bit-equal, in vectorized passes and without their mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any, relu: float | None) -> Tensor:
        ends = [end for end in (low, high) if isinstance(end, Tensor)]
        ctx.save_for_backward(x, scale, *ends)
        ctx.ends = None if ends else (low, high)
        ctx.limits = (-math.inf, math.inf) if relu is None else (0.0, relu)
        # The reciprocal in float32, as in the kernels; low and high are relative to the zero point.
        inverse = 1.0 / scale
        if relu is not None:
            low, high = _of_relu(low, high, inverse, relu)
        return _clamp_((x * inverse).round_(), low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, *ends = ctx.saved_tensors
        low, high = ctx.ends or ends
        least, most = ctx.limits
        nothing = None, None, None, None
        if ctx.ends and scale.dim() == 0 and _is_near(x):
            # Find clamped values without rounding again.
            first, last = first_clamped(float(scale), low, high)
            return torch.ops.aten.hardtanh_backward(gradient, x, max(first, least), min(last, most)), *nothing
        if x.device.type == "cpu" and scale.dim() == 0 and torch.compiler.is_compiling():
            if ctx.ends:
                low, high = (torch.full((), end, dtype=torch.int32, device=x.device) for end in (low, high))
            return torch.ops.qat_lightning.pass_unclamped(gradient, x, scale, low, high, least, most), *nothing
        integers = (x * (1.0 / scale)).round_()
        if ctx.ends:
            return torch.ops.aten.hardtanh_backward(gradient, integers, low - 0.5, high + 0.5), *nothing
        return torch.where((integers >= low) & (integers <= high), gradient, 0.0), *nothing


def _clamp_(integers: Tensor, low: Any, high: Any) -> Tensor:
    """Clamp in place; clamping to tensors uses two vectorized passes, where `torch.clamp` is four times slower."""
    if not isinstance(low, Tensor) or low.dtype != integers.dtype:
        return integers.clamp_(low, high)
    return torch.minimum(torch.maximum(integers, low, out=integers), high, out=integers)


def _of_relu(low: Any, high: Any, inverse: Tensor, largest: float) -> tuple[Any, Any]:
    """The limits of the grid, restricted to the rounded limits of the ReLU: rounding is monotonic."""
    if isinstance(low, Tensor):
        return low.clamp(min=0), torch.minimum(high, (largest * inverse).round())
    return max(low, 0), high if math.isinf(largest) else min(high, float((largest * inverse).round()))


@functools.lru_cache(maxsize=1024)  # frozen ranges ask for the same values again
def first_clamped(scale: float, low: int, high: int) -> tuple[float, float]:
    """The largest float32 that rounds to an integer below ``low``, and the smallest that rounds to one above ``high``.

    Args:
        scale: A float32.
        low: Smallest integer of the grid, relative to the zero point.
        high: Largest integer.

    Example:
        >>> first_clamped(1.0, -127, 126)
        (-127.5, 126.50000762939453)
    """
    with np.errstate(over="ignore"):
        inverse = np.float32(1.0) / np.float32(scale)
        return -_first_above(inverse, -low), _first_above(inverse, high)


def _first_above(inverse: np.float32, integer: int) -> float:
    """The smallest float32 whose product with ``inverse`` rounds to more than ``integer``; ties round to even."""
    target = np.float32(integer + 0.5)
    if integer % 2 == 0:
        target = np.nextafter(target, np.float32(np.inf))
    x = target / inverse
    while x * inverse >= target:
        x = np.nextafter(x, np.float32(-np.inf))
    while x * inverse < target:
        x = np.nextafter(x, np.float32(np.inf))
    return float(x)


# A custom op in compiled graphs for CPUs: the compiler would store the mask of clamped values as bytes, and generate
# code for it that is not vectorized and ten times slower than everything around it.
_LIBRARY = torch.library.Library("qat_lightning", "DEF")
_LIBRARY.define(
    "pass_unclamped(Tensor gradient, Tensor x, Tensor scale, Tensor low, Tensor high, float least, float most)"
    " -> Tensor"
)


def _pass_unclamped(
    gradient: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, least: float, most: float
) -> Tensor:
    first, last = first_clamped(float(scale), int(low), int(high))
    ends = max(first, least), min(last, most)
    passed: Tensor = torch.empty_like(x)  # in the memory format that the compiler was told
    torch.ops.aten.hardtanh_backward.grad_input(gradient, x, *ends, grad_input=passed)
    return passed


_LIBRARY.impl("pass_unclamped", _pass_unclamped, "CPU")
torch.library.register_fake(
    "qat_lightning::pass_unclamped", lambda gradient, x, *others: torch.empty_like(x), lib=_LIBRARY
)


def _round_on_gpu(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    """Upstream's single kernel in place of several: on a GPU the number of kernels matters."""
    if not isinstance(zero_point, Tensor):
        zero_point = torch.full_like(scale, zero_point, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, quant_min, quant_max)


class _RoundWithin(torch.autograd.Function):
    """`_Round` where nothing is clamped, or by half a step at most, so the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any = None, high: Any = None) -> Tensor:
        integers = (x * (1.0 / scale)).round_()
        if low is not None:
            integers = _clamp_(integers, low, high)
        return integers.mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None, None, None


class _RoundFolded(torch.autograd.Function):
    """Fold, round within the grid and unfold; the factors in the gradient cancel."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, inverse: Tensor, unfold: Tensor) -> Tensor:
        return (weight * factor).mul_(inverse).round_().mul_(unfold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None, None, None


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
    rounded: Tensor = _RoundLearned.apply(x.float(), scale, zero_point, quant_min, quant_max)  # type: ignore[no-untyped-call]
    return rounded.to(x.dtype)


class _RoundLearned(torch.autograd.Function):
    """``torch._fake_quantize_learnable_per_{tensor,channel}_affine`` in vectorized passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        zero_point = zero_point.round()
        integers = (x * (1.0 / scale)).round_().add_(zero_point).clamp_(quant_min, quant_max)
        rounded = integers.sub_(zero_point).mul_(scale)
        ctx.save_for_backward(x, scale, zero_point, rounded)
        ctx.limits = quant_min, quant_max
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, zero_point, rounded = ctx.saved_tensors
        low, high = ctx.limits
        inverse = 1.0 / scale
        if x.device.type == "cpu" and scale.dim() == 0:
            ends = [(end - zero_point).to(torch.int32) for end in (low, high)]
            passed = torch.ops.qat_lightning.pass_unclamped(gradient, x, scale, *ends, -math.inf, math.inf)
        else:
            integers = (x * inverse).round_().add_(zero_point)
            passed = torch.ops.aten.hardtanh_backward(gradient, integers, low - 0.5, high + 0.5)
        cut = gradient - passed
        # Gradient of the scale: inside the grid the rounding error in steps, outside the distance from the zero point.
        of_scale = (rounded - x).mul_(gradient).addcmul_(cut, x).sum_to_size(scale.shape) * inverse
        of_zero_point = cut.sum_to_size(zero_point.shape) * -scale
        return passed, of_scale, of_zero_point, None, None
