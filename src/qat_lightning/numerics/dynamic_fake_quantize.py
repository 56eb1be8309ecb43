"""Rounding of activations to a grid whose range is computed in each call, as dynamic kernels do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat_lightning.numerics.grid import along, choose_qparams, round_within_half_a_step, smallest_and_largest

DynamicGranularity = Literal["per_tensor", "per_token"]
"""Whether all values of a call share one range, or each token (along the last dimension) has its own."""

_LOW, _HIGH = -128, 127


_disturbing: list[Callable[[Any], Any]] = []


@contextmanager
def disturbed_roundings(disturb: Callable[[Any], Any]) -> Iterator[None]:
    """Let dynamic rounding round ``disturb(input)``, to measure the effect of rounding alone."""
    _disturbing.append(disturb)
    try:
        yield
    finally:
        _disturbing.pop()


def disturbed(x: Tensor) -> Tensor:
    """``x``, or within `disturbed_roundings` the disturbed ``x``."""
    changed: Tensor = _disturbing[-1](x) if _disturbing else x
    return changed


def round_dynamically(x: Tensor, granularity: DynamicGranularity = "per_tensor", *, symmetric: bool = False) -> Tensor:
    """Round ``x`` to the 8-bit grid of its own range; the gradient passes straight through.

    Per tensor and affine, the grid is that of PyTorch's dynamic kernels, chosen by the same function. Per token, it is
    that of ExecuTorch's and torchao's ``8da4w``: affine on -128..127, or symmetric on -127..127.

    Args:
        x: Values of any shape and floating dtype; a token is the values along the last dimension.
        granularity: Which values share a range.
        symmetric: Whether the zero point is 0.

    Returns:
        The rounded values, in the shape and dtype of ``x``. With a range that is not finite the result is meaningless,
        as in the kernels.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, 2.55], [0.0, 10.0, 25.5]])
        >>> torch.allclose(round_dynamically(x, "per_token"), x, atol=1e-5)
        True
        >>> torch.allclose(round_dynamically(x, "per_tensor"), x, atol=1e-5)
        False
    """
    if not x.numel():
        return x
    if not torch.compiler.is_compiling():
        x = disturbed(x)
    low, high = (_LOW + 1, _HIGH) if symmetric else (_LOW, _HIGH)
    rows = x.reshape(-1, x.shape[-1]) if granularity == "per_token" and x.dim() else x
    axis = 0 if granularity == "per_token" and x.dim() else None
    scale, zero_point = _qparams(rows.detach().float(), axis, low, high, symmetric=symmetric)
    if _is_traced():
        return _in_plain_ops(rows, scale, zero_point, axis, low, high).reshape(x.shape)
    zero = 0 if symmetric else zero_point
    rounded = round_within_half_a_step(rows, scale, zero, quant_min=low, quant_max=high, axis=axis)
    return rounded.reshape(x.shape)


@torch.no_grad()
def _qparams(rows: Tensor, axis: int | None, low: int, high: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    captured = torch.compiler.is_compiling() or _is_traced()
    if axis is None and not symmetric and rows.device.type == "cpu" and not captured:
        # The kernels' own function, which may choose another zero point where two are equally good.
        scale, zero_point = torch._choose_qparams_per_tensor(rows, False)
        return torch.tensor(scale), torch.tensor(int(zero_point) + low, dtype=torch.int32)
    ends = smallest_and_largest(rows, axis)
    return choose_qparams(*ends, quant_min=low, quant_max=high, symmetric=symmetric)


def _is_traced() -> bool:
    """Whether TorchScript is tracing."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _in_plain_ops(rows: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    """`fake_quantize` for TorchScript, which supports neither autograd functions nor ranges as Python numbers."""
    scale, zero_point = along(scale, rows, axis), along(zero_point, rows, axis)
    integers = torch.round(rows.float() * (1.0 / scale))
    within = torch.minimum(torch.maximum(integers, low - zero_point), high - zero_point)
    return (within * scale).to(rows.dtype)


class DynamicFakeQuantize(nn.Module):
    """`round_dynamically` as a module with a switch; without state, so nothing of it is in a checkpoint.

    Args:
        granularity: Which values share a range.
        symmetric: Whether the zero point is 0.

    Attributes:
        fake_quant_enabled: Whether `forward` rounds.
        left_float: Whether it never rounds, because the layer cannot be converted to int8.
    """

    def __init__(self, granularity: DynamicGranularity = "per_tensor", *, symmetric: bool = False) -> None:
        super().__init__()
        self.granularity: DynamicGranularity = granularity
        self.symmetric = symmetric
        self.fake_quant_enabled = True
        self.left_float = False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself before fake-quantization is enabled; afterwards ``x`` on the grid of its range."""
        if not self.fake_quant_enabled or self.left_float:
            return x
        return round_dynamically(x, self.granularity, symmetric=self.symmetric)

    def extra_repr(self) -> str:
        """Which values share a range, for ``print``."""
        return f"8 bits, {'symmetric' if self.symmetric else 'affine'}, {self.granularity}"
