"""Scale and zero point as trainable parameters: learned step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.numerics.grid import EPS, fake_quantize_learned

_FIRST_FORM, _FORM = 1, 2
"""Form of ``log_ratio``: in `_FIRST_FORM`, found in older checkpoints, a scale is ``exp(10 * log_ratio)``."""

SLOWER_BELOW = 0.25
"""Share of the initial scale below which plain SGD moves a scale by less than in the paper."""


def move_only(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Move a module's own tensors to the device that ``fn`` moves to, and keep their dtypes."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(fn(torch.empty(0, device=tensor.device)).device)

    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = moved(buffer)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = moved(parameter.data)
            if parameter.grad is not None:
                parameter.grad.data = moved(parameter.grad.data)


class LearnedStep(nn.Module):
    """Scale, and perhaps zero point, of one grid as parameters.

    Esser et al., 2020, https://arxiv.org/abs/1902.08153 (scale), and Bhalgat et al., 2020,
    https://arxiv.org/abs/2004.09576 (zero point). They start from the observed range when fake-quantization is enabled.

    The parameters are relative to the initial values, so that one learning rate suits scales of any size with
    optimizers that normalize the gradient (Adam), and weight decay pulls to the observed range instead of 0. With ``u =
    rate * log_ratio`` a scale is ``base_scale * exp(u)`` for ``u < 0`` and ``base_scale * (1 + u)`` otherwise: it never
    reaches 0, and never grows faster than in the paper, with any optimizer. A zero point is ``base_zero_point + rate *
    shift * (quant_max - quant_min)``. Gradients are scaled so that plain SGD moves the scale ``rate`` times as fast as
    in the papers, but never to 0: see `SLOWER_BELOW`. A scale is limited so that the largest value of the initial grid
    is still rounded to an integer other than 0, and a zero point to the grid.

    Args:
        channels: Number of scales; None for a single one of shape ``()``.
        quant_min: Smallest integer of the grid.
        quant_max: Largest integer.
        learn_zero_point: Whether the zero point is a parameter as well.
        rate: Factor on the optimizer's learning rate.

    Attributes:
        log_ratio: float32 parameter of shape ``()`` or ``(channels,)``, initially 0.
        shift: float32 parameter of the same shape, initially 0; None if only the scale is learned.
        base_scale: float32 buffer.
        base_zero_point: float32 buffer.
        learning: int64 buffer, nonzero once they learn.
    """

    log_ratio: nn.Parameter
    shift: nn.Parameter | None
    base_scale: Tensor
    base_zero_point: Tensor
    learning: Tensor

    def __init__(
        self, channels: int | None, *, quant_min: int, quant_max: int, learn_zero_point: bool, rate: float = 1.0
    ) -> None:
        super().__init__()
        shape = () if channels is None else (channels,)
        self.quant_min, self.quant_max, self.rate = quant_min, quant_max, rate
        self.largest_scale: float | None = None
        self.log_ratio = nn.Parameter(torch.zeros(shape))
        self.shift = nn.Parameter(torch.zeros(shape)) if learn_zero_point else None
        self.register_buffer("base_scale", torch.ones(shape))
        self.register_buffer("base_zero_point", torch.zeros(shape))
        self.register_buffer("learning", torch.tensor(0))
        self._learns: bool | None = None

    def begins_at_zero(self, largest: float) -> None:
        """Restrict the grid to the output of a ReLU, from 0 to ``largest``, so that it can replace the ReLU."""
        self.shift = None
        self.largest_scale = largest / (self.quant_max - self.quant_min) if math.isfinite(largest) else None

    def take_limits(self, quant_min: int, quant_max: int) -> None:
        """Use another grid, before learning begins."""
        if self.largest_scale is not None:
            self.largest_scale *= (self.quant_max - self.quant_min) / (quant_max - quant_min)
        self.quant_min, self.quant_max = quant_min, quant_max

    @property
    def learns(self) -> bool:
        """Whether scale and zero point are learned by now, and no longer follow the observed range."""
        if self._learns is None:
            self._learns = bool(self.learning)
        return self._learns

    def look_again(self) -> None:
        """Read the buffers again, which were changed from outside."""
        self._learns = None

    @torch.no_grad()
    def begin(self, scale: Tensor, zero_point: Tensor) -> None:
        """Begin to learn from these values."""
        self.base_scale.copy_(scale)
        self.base_zero_point.copy_(zero_point)
        self.learning.fill_(_FORM)
        self._learns = True

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), detached."""
        with torch.no_grad():
            scale, zero_point = self._values(1.0)
            return scale, torch.round(zero_point).to(torch.int32)

    def round(self, x: Tensor, *, axis: int | None, is_weight: bool) -> Tensor:
        """``x`` on the grid, with gradients for scale and zero point, scaled as in section 2.2 of LSQ."""
        values = x.numel() // (self.log_ratio.numel() if is_weight else max(1, x.shape[0] if x.dim() else 1))
        scale, zero_point = self._values(1.0 / math.sqrt(max(1, values) * self.quant_max))
        grid = {"quant_min": self.quant_min, "quant_max": self.quant_max}
        return fake_quantize_learned(x, scale, zero_point, axis=axis, **grid)

    def _values(self, factor: float) -> tuple[Tensor, Tensor]:
        """Scale and zero point, with gradients scaled so that steps of plain SGD are those of LSQ."""
        scaled, most = factor / (self._slope().square() * self.rate), self._most() / self.rate
        u = self.rate * _limited(self.log_ratio, scaled, torch.full_like(most, -torch.inf), most)
        scale = self.base_scale * torch.where(u < 0, u.clamp(max=0.0).exp(), 1.0 + u)
        zero_point = self.base_zero_point
        if self.shift is not None:
            steps = self.rate * float(self.quant_max - self.quant_min)
            scaled = factor * self.rate / (self._slope().square() * steps**2)
            least, most = ((end - zero_point) / steps for end in (self.quant_min, self.quant_max))
            zero_point = zero_point + steps * _limited(self.shift, scaled, least, most)
        return scale.clamp(min=EPS), zero_point

    def _slope(self) -> Tensor:
        """Derivative of the scale with respect to ``u``; bounded from below at `SLOWER_BELOW`.

        The gradient is divided by its square, and would otherwise become infinite as it goes to 0.
        """
        return self.base_scale * (self.rate * self.log_ratio.detach()).clamp(max=0.0).exp().clamp(min=SLOWER_BELOW)

    def _most(self) -> Tensor:
        """The upper limit of ``u``."""
        ratio = torch.full_like(self.base_scale, max(1.0, (self.quant_max - self.quant_min) // 2))
        if self.largest_scale is not None:
            ratio = torch.minimum(ratio, self.largest_scale / self.base_scale)
        return torch.where(ratio < 1, ratio.log(), ratio - 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedStep:
        move_only(self, fn)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.look_again()
        if f"{prefix}learning" in state_dict and int(self.learning) == _FIRST_FORM:
            with torch.no_grad():
                logarithm = 10.0 * self.log_ratio
                self.log_ratio.copy_(torch.where(logarithm < 0, logarithm, logarithm.expm1()) / self.rate)
                if self.shift is not None:
                    self.shift.mul_(10.0 / self.rate)
                self.learning.fill_(_FORM)


def _limited(x: Tensor, factor: Tensor, least: Tensor, most: Tensor) -> Tensor:
    result: Tensor = _Limited.apply(x, factor, least, most)  # type: ignore[no-untyped-call]
    return result


class _Limited(torch.autograd.Function):
    """A parameter clamped to its limits, with a scaled gradient that never pushes it beyond them but pulls it back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, least: Tensor, most: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor, least, most)
        return torch.clamp(x, least, most)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, factor, least, most = ctx.saved_tensors
        pushed = ((x >= most) & (gradient < 0)) | ((x <= least) & (gradient > 0))
        # The factor of a scale whose square overflows is 0, and its gradient may be infinite: it stays where it is.
        return torch.where(pushed | (factor == 0), 0.0, gradient * factor), None, None, None
