"""The one FakeQuantize that every mode trains with and converts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase as _TorchFakeQuantizeBase

from qat_lightning.numerics.course import Course
from qat_lightning.numerics.grid import (
    along,
    choose_qparams,
    fake_quantize,
    fake_quantize_folded,
    relu_up_to,
    smallest_and_largest,
)
from qat_lightning.numerics.learned_step import LearnedStep, move_only
from qat_lightning.numerics.observers import (
    Histogram,
    entropy_range,
    least_squares_clip,
    least_squares_range,
    percentile_range,
)
from qat_lightning.numerics.recomputation import decided_once, recomputes
from qat_lightning.processes import process_count, range_over_all

RangeSource = Literal["moving_average", "min_max", "histogram_mse", "histogram_kl", "percentile", "present", "fixed"]

_STORAGE = {torch.uint8: torch.quint8, torch.int8: torch.qint8, torch.quint8: torch.quint8, torch.qint8: torch.qint8}


class FakeQuantize(_TorchFakeQuantizeBase):
    """Observes a range and rounds to the integer grid of that range, in every mode.

    It is a `FakeQuantizeBase` to torch.ao, and to torchao once `qat_lightning.modes.pt2e` is imported, so that both
    converters take it. Its flags are plain attributes that a schedule sets: they are not part of a checkpoint, because
    what is on is a function of the step.

    Args:
        dtype: ``torch.uint8`` or ``torch.int8``: the integers that the kernel stores.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        qscheme: One of torch's four, as upstream's converters read it.
        ch_axis: Channel dimension of a per-channel scheme, else -1.
        source: ``"moving_average"`` of the batches' ranges, kept in the buffers ``min_val`` and ``max_val`` and moved
            only in training; ``"min_max"``: the smallest and largest value of all batches; ``"histogram_mse"``,
            ``"histogram_kl"``, ``"percentile"``: a range that `settle` chooses from the histogram of all batches;
            ``"present"``: the range of the tensor at hand, for weights, so that it is never a step old; ``"fixed"``: a
            range known beforehand, given as ``fixed_range``.
        averaging_constant: Weight of the newest batch, once there were many. Before, it is 9 / (10 + batches seen), as
            in ``tf.train.ExponentialMovingAverage(num_updates=…)``, so that ranges follow a network that still grows.
        percentile: Share of the values, in percent, that ``source="percentile"`` keeps on each side.
        clipped: Whether ``source="present"`` takes the share of the range with the least mean squared error. The share
            is chosen when rounding first comes on, and kept in the buffer ``clip``.
        learned: ``"none"``, ``"lsq"`` or ``"lsq+"``: see `LearnedStep`.
        fixed_range: Smallest and largest value for ``source="fixed"``.
        is_dynamic: Accepted because upstream's converters pass it; only False is possible.
        factory_kwargs: The device that upstream's QAT layers pass, on which the buffers are made.

    Attributes:
        fake_quant_enabled: Whether `forward` rounds.
        observer_enabled: Whether `forward` moves the range (in training).
        observe_in_evaluation: Whether it does in evaluation as well.
        left_float: Whether it never rounds, because what it belongs to cannot be int8: see
            `qat_lightning.modes.left_float`.
        is_shared: Whether it comes by several times in a forward pass of the example.
        course: What it knows of the network as a whole; None outside of a prepared network.
        batches: Batches that the range was moved by, an int64 buffer.
        reduce_across_processes: Whether every batch's range is taken over all processes of a distributed training. Only
            where all of them run the same modules in the same order, or they wait for each other for ever.
        nonfinite_batches: Batches whose range was NaN or infinite and was left out, an int64 buffer that is not saved.
        step: Scale and zero point as parameters, where they learn.

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
    clip: Tensor
    course: Course | None = None
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
        percentile: float = 99.99,
        clipped: bool = False,
        learned: Literal["none", "lsq", "lsq+"] = "none",
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
        self.percentile = percentile
        self.clipped = clipped
        self.learned = learned
        self.is_dynamic = False
        self.fake_quant_enabled = True
        self.observer_enabled = True
        self.observe_in_evaluation = False
        self.reduce_across_processes = False
        self.left_float = False
        self.is_shared = False
        self._passed: tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor] | None = None
        self._seen = source == "fixed"
        self.step: LearnedStep | None = None
        self.histogram = Histogram() if source in ("histogram_mse", "histogram_kl", "percentile") else None
        if source == "present":
            # Not buffers: a weight's range is worked out from the weight each time, and never loaded or averaged.
            self._present: tuple[Tensor, Tensor] | None = None
            self._clip_known = False
            self._held = False
            return
        if learned != "none":
            self.step = self._learned_step(None)
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
    def observed(self) -> bool:
        """Whether the range is that of batches, and not a weight's or fixed."""
        return self.source not in ("present", "fixed")

    @property
    def seen(self) -> bool:
        """Whether a range is known; without one nothing is rounded, and what needs it stays float."""
        # To look at it breaks a compiled graph, which `_round` does without unless something has to begin to learn.
        if not self._seen and (self.learned != "none" or not torch.compiler.is_compiling()):
            self._seen = self.learns or (self.observed and bool(self.min_val <= self.max_val))
        return self._seen

    @property
    def learns(self) -> bool:
        """Whether scale and zero point are parameters now."""
        return self.step is not None and self.step.learns

    @property
    def activation_post_process(self) -> FakeQuantize:
        """Itself: upstream's converters look for the observer inside a fake-quantize."""
        return self

    @torch.no_grad()
    def materialize(self, weight: Tensor) -> None:
        """Make what depends on the number of channels, for a FakeQuantize of weights that keeps something of its own.

        Args:
            weight: The weight as it will be given to `forward`.
        """
        channels = weight.shape[self.ch_axis] if self.per_channel else None
        if self.clipped and "clip" not in self._buffers:
            self.register_buffer("clip", torch.zeros(() if channels is None else channels, device=weight.device))
        if self.learned != "none" and self.step is None:
            self.step = self._learned_step(channels).to(weight.device)

    def _learned_step(self, channels: int | None) -> LearnedStep:
        moves = self.learned == "lsq+" and self.observed and not self.symmetric
        return LearnedStep(channels, quant_min=self.quant_min, quant_max=self.quant_max, learn_zero_point=moves)

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value that is represented, float32, shape ``()`` or ``(channels,)``."""
        if self.learns:
            scale, zero_point = self.calculate_qparams()
            return (self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale
        if self.source == "present":
            if self._present is None:
                raise RuntimeError("A weight's FakeQuantize has a range only after it was given the weight.")
            return self._present
        return self.min_val, self.max_val

    @torch.no_grad()
    def observe(self, x: Tensor, relu: float | None = None) -> None:
        """Take the range of ``x`` into account; a non-finite one is counted and left out.

        Args:
            x: Values of any shape and floating dtype.
            relu: The largest value that a ReLU leaves, through which ``x`` is still to go; None for no ReLU.
        """
        values = x.detach().float()
        if self.source == "present":
            if not self._held:
                low, high = self._ends(values)
                self._is_present(*((low, high) if not self.clipped else self._clip(values, low, high)))
            return
        reduce = self.reduce_across_processes and process_count() > 1
        empty = values.numel() == 0
        if empty and not reduce:
            return
        # A process with nothing to show takes part all the same: the others wait for it.
        low, high = smallest_and_largest(values.new_full((1,), torch.nan) if empty else values)
        if relu is not None:
            low, high = low.clamp(0.0, relu), high.clamp(0.0, relu)
        finite = torch.isfinite(low) & torch.isfinite(high)
        self.nonfinite_batches.add_(~finite & (not empty))
        if reduce:
            low, high, finite = range_over_all(low, high, finite)
        if self.histogram is not None and bool(finite):
            self.histogram.observe(values)
        before = self.min_val, self.max_val, self.batches
        if self.course is not None and self.course.in_forward:
            low, high, finite, before = self._of_whole_forward(low, high, finite)
        ends = self._average(low, high, *before) if self.source == "moving_average" else self._extend(low, high)
        for buffer, old, new in zip((self.min_val, self.max_val), before, ends, strict=False):
            buffer.copy_(torch.where(finite, new, old))
        self.batches.copy_(before[2] + finite)

    def _of_whole_forward(self, low: Tensor, high: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """The range of all that came by in this forward pass, and range and count of before it.

        A layer that is called several times sees one batch, in parts: the average is moved once, by their union, and
        with each part anew from where it was.
        """
        low, high = torch.where(finite, low, torch.inf), torch.where(finite, high, -torch.inf)
        if self._passed is None:
            before = self.min_val.clone(), self.max_val.clone(), self.batches.clone()
        else:
            before, others_low, others_high = self._passed
            low, high = torch.minimum(low, others_low), torch.maximum(high, others_high)
        self._passed = before, low, high
        return low, high, low <= high, before

    def begin_forward(self) -> None:
        """From here on, what comes by belongs to another forward pass."""
        self._passed = None

    def _is_present(self, low: Tensor, high: Tensor) -> None:
        self._present = low, high
        self._seen = True

    def _average(
        self, low: Tensor, high: Tensor, before_low: Tensor, before_high: Tensor, batches: Tensor
    ) -> tuple[Tensor, Tensor]:
        constant = (9.0 / (batches + 10)).clamp(min=self.averaging_constant)
        first = batches == 0
        average_low = torch.where(first, low, before_low + constant * (low - before_low))
        average_high = torch.where(first, high, before_high + constant * (high - before_high))
        return average_low, average_high

    def _extend(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return torch.minimum(low, self.min_val), torch.maximum(high, self.max_val)

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return smallest_and_largest(values, self.ch_axis if self.per_channel else None)

    def _by_channel(self, values: Tensor) -> Tensor:
        return values.movedim(self.ch_axis, 0).flatten(1) if self.per_channel else values.reshape(1, -1)

    def _clip(self, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not self._clip_known:
            self.materialize(values)
            if not bool(self.clip.all()):
                self.clip.copy_(
                    least_squares_clip(
                        self._by_channel(values),
                        quant_min=self.quant_min,
                        quant_max=self.quant_max,
                        symmetric=self.symmetric,
                    ).reshape(self.clip.shape)
                )
            self._clip_known = True
        return low * self.clip, high * self.clip

    def begins_at_zero(self, largest: float) -> None:
        """Keep a learned grid to what a ReLU in front leaves, which conversion drops because the grid clamps alike.

        Args:
            largest: The largest value that the ReLU leaves, such as 6; inf for none.
        """
        if self.step is not None:
            self.step.begins_at_zero(largest)

    def hold(self) -> None:
        """Keep the range of the present weight, whatever weight comes: conversion rounds it before it packs it."""
        self._held = True

    @torch.no_grad()
    def settle(self) -> None:
        """Choose the range from the histogram of all batches, where that is the source; calibration ends with it."""
        if self.histogram is None or not self.seen:
            return
        low, high = float(self.min_val), float(self.max_val)
        grid = {"quant_min": self.quant_min, "quant_max": self.quant_max}
        if self.source == "percentile":
            inner = percentile_range(self.histogram, self.percentile)
            chosen = max(low, inner[0]), min(high, inner[1])
        elif self.source == "histogram_kl":
            chosen = entropy_range(self.histogram, low, high, levels=self.quant_max - self.quant_min + 1)
        else:
            chosen = least_squares_range(self.histogram, low, high, symmetric=self.symmetric, **grid)
        self.min_val.fill_(chosen[0])
        self.max_val.fill_(chosen[1])

    @torch.no_grad()
    def forget(self) -> None:
        """Forget the range of all batches, to observe anew."""
        if not self.observed:
            return
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)
        self.batches.zero_()
        self._seen = False
        if self.histogram is not None:
            self.histogram = Histogram().to(self.min_val.device)

    @torch.no_grad()
    def widen_to(self, other: FakeQuantize) -> None:
        """Take the range of another place into its own, which holds both from now on."""
        low, high = (end.to(self.min_val.device) for end in other.range())
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))
        self.batches.copy_(torch.maximum(self.batches, other.batches.to(self.batches.device)))
        self._seen = False

    def forward(self, x: Tensor, factor: Tensor | None = None, axis: int = 0, *, relu: float | None = None) -> Tensor:
        """``x`` itself before rounding is on; afterwards ``x`` on the grid, in the shape and dtype of ``x``.

        Args:
            x: Values of any shape and floating dtype.
            factor: For a weight behind which BatchNorm is folded: float32, shape ``(channels,)``, without gradient.
                What is rounded is ``x * factor``, and the result is divided by it again. Where it is 0, that is ``x``.
            axis: The dimension of the channels that ``factor`` is for.
            relu: The largest value that a ReLU leaves, through which ``x`` goes first; None for no ReLU.
        """
        if relu is not None and not decided_once(lambda: self._rounds_relu):
            x, relu = relu_up_to(x, relu), None
        if self.left_float:
            return x
        if factor is not None:
            given = factor
            return self._round_folded(x, decided_once(lambda: given), axis) if self.fake_quant_enabled else x
        if self.learns:
            return self.round(x)
        if self.source == "present":
            if self.fake_quant_enabled:
                self.observe(x)
        elif self.observes:
            self.observe(x, relu)
        return self._round(x, clamps=not self._holds_all, relu=relu)

    @property
    def _rounds_relu(self) -> bool:
        """Whether a ReLU in front can now be done in the passes of rounding."""
        plain = self.observed and self.histogram is None and self.learned == "none"
        return plain and self.fake_quant_enabled and not self.left_float and self.seen

    @property
    def _holds_all(self) -> bool:
        """Whether the grid is that of all values of the present weight, so that none of them is beyond it."""
        plain = self.source == "present" and not self.clipped and self.learned == "none"
        return plain and self.symmetric and not self._held

    def _round_folded(self, weight: Tensor, factor: Tensor, axis: int) -> Tensor:
        if self._holds_all and (not self.per_channel or self.ch_axis == axis):
            self._is_present(*self._folded_ends(weight.detach(), factor, axis))
            scale, _ = self.calculate_qparams()
            return fake_quantize_folded(weight, factor, scale, axis=axis)
        factor = along(factor, weight, axis)
        dead = factor == 0
        folded = self.forward(weight.float() * factor)
        return torch.where(dead, weight.float(), folded / torch.where(dead, 1.0, factor)).to(weight.dtype)

    @torch.no_grad()
    def _folded_ends(self, weight: Tensor, factor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """The range of ``weight * factor``, without that product: rounding to float32 keeps order."""
        ends = [end.float() * factor for end in smallest_and_largest(weight, axis)]
        low, high = torch.minimum(*ends), torch.maximum(*ends)
        return (low, high) if self.per_channel else (low.amin(), high.amax())

    @property
    def observes(self) -> bool:
        """Whether `forward` moves the range now."""
        here = self._trains or self.observe_in_evaluation
        return self.observer_enabled and here and self.observed and not recomputes()

    @property
    def _trains(self) -> bool:
        """Whether what comes by belongs to the training, also of a part that is kept in evaluation."""
        return self.training or (self.course is not None and self.course.trains)

    def _beginning(self) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point with which the step begins to learn now; None if it does not."""
        if self.step is None or self.step.learns or not self._trains:
            return None
        if self.is_shared and self._passed is not None:
            # What this forward pass has shown so far is a part of the batch.
            (low, high, batches), *_ = self._passed
            return self._qparams_of(low, high) if bool(batches) else None
        return self.calculate_qparams()

    def round(self, x: Tensor) -> Tensor:
        """`forward` without observing."""
        return self._round(x, clamps=True)

    def _round(self, x: Tensor, *, clamps: bool, relu: float | None = None) -> Tensor:
        if not self.fake_quant_enabled or self.left_float:
            return x
        if not decided_once(lambda: self.seen):
            # While a graph is traced, whether a range is known may change: then the graph looks.
            known = self.min_val <= self.max_val if torch.compiler.is_compiling() and self.observed else None
            return x if known is None else torch.where(known, self._on_grid(x, clamps=clamps), x)
        if self.step is not None:
            beginning = self._beginning()
            if beginning is not None:
                self.step.begin(*beginning)
            if self.step.learns:
                axis = self.ch_axis if self.per_channel else None
                return self.step.round(x, axis=axis, is_weight=self.source == "present")
        return self._on_grid(x, clamps=clamps, relu=relu)

    def _on_grid(self, x: Tensor, *, clamps: bool, relu: float | None = None) -> Tensor:
        scale, zero_point = decided_once(self.calculate_qparams)
        middle = self.quant_min + (self.quant_max - self.quant_min + 1) // 2
        return fake_quantize(
            x,
            scale,
            middle if self.symmetric else zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            axis=self.ch_axis if self.per_channel else None,
            clamps=clamps,
            relu=relu,
        )

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) of the present range: what training rounds with and convert reads."""
        if self.step is not None and self.step.learns:
            return self.step.qparams()
        return self._qparams_of(*self.range())

    def _qparams_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
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
        move_only(self, fn)
        for child in self.children():
            child._apply(fn)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = self.source == "fixed"
        self._clip_known = False

    def extra_repr(self) -> str:
        """Grid and range, for ``print(network)``."""
        grid = f"{str(self.dtype).removeprefix('torch.')} [{self.quant_min}, {self.quant_max}]"
        where = f"per channel {self.ch_axis}" if self.per_channel else "per tensor"
        learned = "" if self.learned == "none" else f", {self.learned}"
        return f"{grid}, {'symmetric' if self.symmetric else 'affine'}, {where}, {self.source}{learned}"

    @property
    def storage_dtype(self) -> torch.dtype:
        """The quantized dtype of the same integers: ``torch.quint8`` or ``torch.qint8``."""
        return _STORAGE[self.dtype]
