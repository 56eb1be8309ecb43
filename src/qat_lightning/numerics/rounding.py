"""Rounding as differentiable functions: the straight-through passes and their gradients, in vectorized steps."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def is_near(x: Tensor) -> bool:
    """Whether reading a value is cheap: it would synchronize a GPU and break a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class Round(torch.autograd.Function):
    """``torch.fake_quantize_per_{tensor,channel}_affine``, bit-equal, in vectorized passes and without their mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any, relu: float | None) -> Tensor:
        """``x`` on the grid; the limits are relative to the zero point."""
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
        """The gradient where ``x`` was not clamped."""
        x, scale, *ends = ctx.saved_tensors
        low, high = ctx.ends or ends
        least, most = ctx.limits
        nothing = None, None, None, None
        if ctx.ends and scale.dim() == 0 and is_near(x):
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


def _pass_unclamped_again(gradient: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The same with a derivative of its own, as a gradient penalty needs it."""
    ends = first_clamped(float(scale.detach()), int(low), int(high))
    passed: Tensor = torch.ops.aten.hardtanh_backward(gradient, x, *ends)
    return passed


_LIBRARY.impl("pass_unclamped", _pass_unclamped, "CPU")
torch.library.register_fake(
    "qat_lightning::pass_unclamped", lambda gradient, x, *others: torch.empty_like(x), lib=_LIBRARY
)


def round_on_gpu(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    """Upstream's single kernel in place of several: on a GPU the number of kernels matters."""
    if not isinstance(zero_point, Tensor):
        zero_point = torch.full_like(scale, zero_point, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, quant_min, quant_max)


class RoundWithin(torch.autograd.Function):
    """`Round` where nothing is clamped, or by half a step at most, so the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any = None, high: Any = None) -> Tensor:
        """``x`` on the grid, clamped only if there are limits."""
        integers = (x * (1.0 / scale)).round_()
        if low is not None:
            integers = _clamp_(integers, low, high)
        return integers.mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient, unchanged."""
        return gradient, None, None, None


class RoundFolded(torch.autograd.Function):
    """Fold, round within the grid and unfold; the factors in the gradient cancel."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, inverse: Tensor, unfold: Tensor) -> Tensor:
        """``weight`` on the grid of ``weight * factor``."""
        return (weight * factor).mul_(inverse).round_().mul_(unfold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient, unchanged."""
        return gradient, None, None, None


class RoundLearned(torch.autograd.Function):
    """``torch._fake_quantize_learnable_per_{tensor,channel}_affine`` in vectorized passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        """``x`` on the grid of the rounded zero point."""
        zero_point = zero_point.round()
        integers = (x * (1.0 / scale)).round_().add_(zero_point).clamp_(quant_min, quant_max)
        rounded = integers.sub_(zero_point).mul_(scale)
        ctx.save_for_backward(x, scale, zero_point, rounded)
        ctx.limits = quant_min, quant_max
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradients of ``x``, scale and zero point."""
        x, scale, zero_point, rounded = ctx.saved_tensors
        low, high = ctx.limits
        inverse = 1.0 / scale
        if x.device.type == "cpu" and scale.dim() == 0:
            ends = [(end - zero_point).to(torch.int32) for end in (low, high)]
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                passed = _pass_unclamped_again(gradient, x, scale, *ends)
            else:
                passed = torch.ops.qat_lightning.pass_unclamped(gradient, x, scale, *ends, -math.inf, math.inf)
        else:
            integers = (x * inverse).round_().add_(zero_point)
            passed = torch.ops.aten.hardtanh_backward(gradient, integers, low - 0.5, high + 0.5)
        cut = gradient - passed
        # Gradient of the scale: inside the grid the rounding error in steps, outside the distance from the zero point.
        of_scale = (rounded - x).mul_(gradient).addcmul_(cut, x).sum_to_size(scale.shape) * inverse
        of_zero_point = cut.sum_to_size(zero_point.shape) * -scale
        return passed, of_scale, of_zero_point, None, None
