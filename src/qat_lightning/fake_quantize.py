"""The arithmetic of quantization, and the one FakeQuantize that every mode trains with and converts from.

There is one formula for scale and zero point. Training rounds with it and conversion reads it, so that the integers a
kernel sees are the integers that training saw. (Upstream's fused fake-quantize trains on one grid and converts with
another: https://github.com/pytorch/pytorch/blob/main/torch/ao/quantization/fake_quantize.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase as _TorchFakeQuantizeBase

from qat_lightning._torchao import FakeQuantizeBase as _TorchaoFakeQuantizeBase

EPS = float(torch.finfo(torch.float32).eps)
"""The smallest scale of a range that is not 0."""

RangeSource = Literal["moving_average", "present", "fixed"]

_STORAGE = {torch.uint8: torch.quint8, torch.int8: torch.qint8, torch.quint8: torch.quint8, torch.qint8: torch.qint8}


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
        if axis is None:
            rounded = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, quant_min, quant_max)
        else:
            rounded = torch.fake_quantize_per_channel_affine(values, scale, zero_point, axis, quant_min, quant_max)
        return rounded.to(x.dtype)


class FakeQuantize(_TorchFakeQuantizeBase, _TorchaoFakeQuantizeBase):  # type: ignore[misc]
    """Observes a range and rounds to the integer grid of that range, in every mode.

    It is a `FakeQuantizeBase` to torch.ao and to torchao, so that both converters take it. Its flags are plain
    attributes that a schedule sets: they are not part of a checkpoint, because what is on is a function of the step.

    Args:
        dtype: ``torch.uint8`` or ``torch.int8``: the integers that the kernel stores.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        qscheme: One of torch's four, as upstream's converters read it.
        ch_axis: Channel dimension of a per-channel scheme, else -1.
        source: ``"moving_average"`` of the batches' ranges, kept in the buffers ``min_val`` and ``max_val`` and moved
            only in training; ``"present"``: the range of the tensor at hand, for weights, so that it is never a step
            old; ``"fixed"``: a range known beforehand, given as ``fixed_range``.
        averaging_constant: Weight of the newest batch, once there were many. Before, it is 9 / (10 + batches seen), as
            in ``tf.train.ExponentialMovingAverage(num_updates=…)``, so that ranges follow a network that still grows.
        fixed_range: Smallest and largest value for ``source="fixed"``.
        is_dynamic: Accepted because upstream's converters pass it; only False is possible.
        factory_kwargs: The device that upstream's QAT layers pass, on which the buffers are made.

    Attributes:
        fake_quant_enabled: Whether `forward` rounds.
        observer_enabled: Whether `forward` moves the range (in training).
        observe_in_evaluation: Whether it does in evaluation as well.
        batches: Batches that the range was moved by, an int64 buffer.
        reduce_across_processes: Whether every batch's range is taken over all processes of a distributed training. Only
            where all of them run the same modules in the same order, or they wait for each other for ever.
        nonfinite_batches: Batches whose range was NaN or infinite and was left out, an int64 buffer that is not saved.

    Example:
        >>> fq = FakeQuantize(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)
        >>> y = fq(torch.linspace(0, 2.55, 1000))
        >>> [round(v.item(), 4) for v in fq.calculate_qparams()]
        [0.01, 0]
    """

    min_val: Tensor
    max_val: Tensor
    batches: Tensor
    nonfinite_batches: Tensor
    # Upstream has tensors here.
    fake_quant_enabled: bool  # type: ignore[assignment]
    observer_enabled: bool  # type: ignore[assignment]

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        ch_axis: int = -1,
        source: RangeSource = "moving_average",
        averaging_constant: float = 0.01,
        fixed_range: tuple[float, float] | None = None,
        is_dynamic: bool = False,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        # Upstream's __init__ makes tensors of the flags, which are then averaged by EMA and saved.
        nn.Module.__init__(self)
        if is_dynamic:
            raise ValueError("FakeQuantize observes static ranges only; is_dynamic=True is not possible.")
        self.dtype = dtype
        self.quant_min, self.quant_max = quant_min, quant_max
        self.qscheme = qscheme
        self.ch_axis = ch_axis
        self.source = source
        self.averaging_constant = averaging_constant
        self.is_dynamic = False
        self.fake_quant_enabled = True
        self.observer_enabled = True
        self.observe_in_evaluation = False
        self.reduce_across_processes = False
        self._seen = source == "fixed"
        if source == "present":
            # Not buffers: a weight's range is worked out from the weight each time, and never loaded or averaged.
            self._present: tuple[Tensor, Tensor] | None = None
            return
        low, high = fixed_range if fixed_range is not None else (float("inf"), float("-inf"))
        self.register_buffer("min_val", torch.tensor(low, dtype=torch.float32))
        self.register_buffer("max_val", torch.tensor(high, dtype=torch.float32))
        self.register_buffer("batches", torch.tensor(0))
        self.register_buffer("nonfinite_batches", torch.tensor(0), persistent=False)
        self.to((factory_kwargs or {}).get("device"))

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is in the middle of the grid."""
        return self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)

    @property
    def per_channel(self) -> bool:
        """Whether each channel has its own scale."""
        return self.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)

    @property
    def seen(self) -> bool:
        """Whether a range is known; without one nothing is rounded, and what needs it stays float."""
        if not self._seen and self.source == "moving_average":
            self._seen = bool(self.min_val <= self.max_val)
        return self._seen

    @property
    def activation_post_process(self) -> FakeQuantize:
        """Itself: upstream's converters look for the observer inside a fake-quantize."""
        return self

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value that is represented, float32, shape ``()`` or ``(channels,)``."""
        if self.source == "present":
            if self._present is None:
                raise RuntimeError("A weight's FakeQuantize has a range only after it was given the weight.")
            return self._present
        return self.min_val, self.max_val

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take the range of ``x`` into account; a non-finite one is counted and left out."""
        values = x.detach().float()
        if self.source == "present":
            self._present = self._range_of(values)
            self._seen = True
            return
        reduce = self.reduce_across_processes and _processes() > 1
        empty = values.numel() == 0
        if empty and not reduce:
            return
        # A process with nothing to show takes part all the same: the others wait for it.
        low, high = torch.aminmax(values.new_full((1,), torch.nan) if empty else values)
        finite = torch.isfinite(low) & torch.isfinite(high)
        self.nonfinite_batches.add_(~finite & (not empty))
        if reduce:
            low, high, finite = _over_all_processes(low, high, finite)
        constant = (9.0 / (self.batches + 10)).clamp(min=self.averaging_constant)
        first = self.batches == 0
        average_low = torch.where(first, low, self.min_val + constant * (low - self.min_val))
        average_high = torch.where(first, high, self.max_val + constant * (high - self.max_val))
        self.min_val.copy_(torch.where(finite, average_low, self.min_val))
        self.max_val.copy_(torch.where(finite, average_high, self.max_val))
        self.batches.add_(finite)

    def _range_of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.per_channel:
            low, high = torch.aminmax(values)
            return low, high
        channels = values.movedim(self.ch_axis, 0).flatten(1)
        low, high = torch.aminmax(channels, dim=1)
        return low, high

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself before rounding is on; afterwards ``x`` on the grid, in the shape and dtype of ``x``."""
        if self.source == "present":
            if self.fake_quant_enabled:
                self.observe(x)
        elif self.observes:
            self.observe(x)
        return self.round(x)

    @property
    def observes(self) -> bool:
        """Whether `forward` moves the range now."""
        here = self.training or self.observe_in_evaluation
        return self.observer_enabled and here and self.source == "moving_average"

    def round(self, x: Tensor) -> Tensor:
        """`forward` without observing."""
        if not self.fake_quant_enabled or not self.seen:
            return x
        scale, zero_point = self.calculate_qparams()
        axis = self.ch_axis if self.per_channel else None
        return fake_quantize(x, scale, zero_point, quant_min=self.quant_min, quant_max=self.quant_max, axis=axis)

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) of the present range: what training rounds with and convert reads."""
        low, high = self.range()
        return choose_qparams(
            low,
            high,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            symmetric=self.symmetric,
        )

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch rounding on or off."""
        self.fake_quant_enabled = bool(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch the moving of the range on or off."""
        self.observer_enabled = bool(enabled)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        """Move to another device; ranges stay float32 in any precision of the network."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = self.source == "fixed"

    def extra_repr(self) -> str:
        """Grid and range, for ``print(network)``."""
        grid = f"{str(self.dtype).removeprefix('torch.')} [{self.quant_min}, {self.quant_max}]"
        where = f"per channel {self.ch_axis}" if self.per_channel else "per tensor"
        return f"{grid}, {'symmetric' if self.symmetric else 'affine'}, {where}, {self.source}"

    @property
    def storage_dtype(self) -> torch.dtype:
        """The quantized dtype of the same integers: ``torch.quint8`` or ``torch.qint8``."""
        return _STORAGE[self.dtype]


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _over_all_processes(low: Tensor, high: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The least of the lows and the greatest of the highs, of the processes whose batch was finite."""
    none = torch.full_like(low, -torch.inf)
    bounds = torch.stack([torch.where(finite, -low, none), torch.where(finite, high, none)])
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX)
    return -bounds[0], bounds[1], torch.isfinite(bounds).all()


class SharedRange(nn.Module):
    """Rounds to the grid of a FakeQuantize elsewhere in the network, without moving its range.

    For ops whose output has the grid of their input: only one place may observe a range, or a moving average would mix
    the ranges of several tensors.

    Args:
        fq: Whose grid; not a child, since it is one of the network already.
    """

    def __init__(self, fq: FakeQuantize) -> None:
        super().__init__()
        self.__dict__["fq"] = fq

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, in its shape and dtype."""
        fq: FakeQuantize = self.__dict__["fq"]
        return fq.round(x)
