"""The one FakeQuantize that every mode trains with and converts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase as _TorchFakeQuantizeBase

from qat_lightning.numerics.batch_ranges import batch_histogram
from qat_lightning.numerics.course import Course
from qat_lightning.numerics.grid import (
    along,
    fake_quantize_folded,
    relu_up_to,
    smallest_and_largest,
)
from qat_lightning.numerics.integer_grid import IntegerGrid
from qat_lightning.numerics.learned_step import LearnedStep, move_only
from qat_lightning.numerics.observers import Histogram
from qat_lightning.numerics.ranges import (
    FROM_HISTOGRAM,
    ObservedRange,
    PresentRange,
    RangeSource,
    least_squares_of_batch,
    range_of,
)
from qat_lightning.numerics.recomputation import decided_once, recomputes
from qat_lightning.processes import process_count, range_over_all, sum_over_all


class FakeQuantize(_TorchFakeQuantizeBase):
    """Observes a range and rounds to the integer grid of that range, in every mode.

    It is a `FakeQuantizeBase` of torch.ao, and of torchao once `qat_lightning.modes.pt2e` is imported, so that both
    converters accept it. The schedule sets its flags, which are plain attributes and not part of a checkpoint, because
    they follow from the step.

    Args:
        dtype: Integer dtype; it forms an `IntegerGrid` with the next four arguments.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        qscheme: One of torch's four, read by upstream's converters.
        ch_axis: Channel dimension of a per-channel scheme, else -1.
        source: Source of the range. ``"moving_average"`` of the batches' ranges, updated only in training;
            ``"min_max"`` of all batches; ``"histogram_mse"``, ``"histogram_kl"``, ``"percentile"``: chosen by `settle`
            from all batches; ``"batch_mse"``, ``"batch_percentile"``: moving average of a range chosen from each batch,
            in training only; ``"present"``: of the current tensor, for weights; ``"fixed"``: given as ``fixed_range``.
        averaging_constant: Weight of the newest batch after the first batches; see `ObservedRange`.
        percentile: Percentage of the values that the two percentile sources keep on each side.
        clipped: Whether ``source="present"`` uses the share of the range with the least mean squared error. It is
            chosen when fake-quantization is first enabled, and kept in the buffer ``clip``.
        learned: ``"none"``, ``"lsq"`` or ``"lsq+"``: see `LearnedStep`.
        learned_rate: Factor on the optimizer's learning rate for scale and zero point.
        fixed_range: Smallest and largest value for ``source="fixed"``.
        is_dynamic: Passed by upstream's converters; only False is supported.
        factory_kwargs: Passed by upstream's QAT layers: the device of the buffers.

    Attributes:
        fake_quant_enabled: Whether `forward` rounds.
        observer_enabled: Whether `forward` updates the range (in training).
        observe_in_evaluation: Whether it does so in evaluation as well.
        may_learn: Whether a learned scale begins to learn as soon as `forward` rounds in training.
        left_float: Whether it never rounds, because its layer or op cannot be int8.
        is_shared: Whether it is called several times in a forward pass of the example.
        course: State of the network as a whole; None outside of a prepared network.
        batches: Number of batches in the range, an int64 buffer.
        reduce_across_processes: Whether the range of every batch is reduced over all processes of a distributed
            training. Possible only if all of them run the same modules in the same order; otherwise they deadlock.
        nonfinite_batches: Number of batches that were left out because their range was NaN or infinite, an int64 buffer
            that is not saved.
        origin: The source of the range.
        step: Scale and zero point as parameters, if they are learned.

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
        learned_rate: float = 1.0,
        fixed_range: tuple[float, float] | None = None,
        is_dynamic: bool = False,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        # Upstream's __init__ stores the flags as tensors, which EMA would average and a checkpoint would save.
        nn.Module.__init__(self)
        if is_dynamic:
            raise ValueError("FakeQuantize observes static ranges only; is_dynamic=True is not supported.")
        self.grid = IntegerGrid(dtype, quant_min, quant_max, qscheme, ch_axis)
        self.dtype, self.qscheme, self.ch_axis = dtype, qscheme, ch_axis
        self.quant_min, self.quant_max = quant_min, quant_max
        self.source = source
        self.averaging_constant = averaging_constant
        self.percentile = percentile
        self.clipped = clipped
        self.learned, self.learned_rate = learned, learned_rate
        self.is_dynamic = False
        self.fake_quant_enabled = True
        self.observer_enabled = True
        self.observe_in_evaluation = False
        self.may_learn = True
        self.reduce_across_processes = False
        self.left_float = False
        self.is_shared = False
        self.origin = range_of(source, constant=averaging_constant, percentile=percentile, grid=self.grid)
        self.step: LearnedStep | None = None
        self.histogram = Histogram() if source in FROM_HISTOGRAM else None
        if source == "present":
            return
        if learned != "none":
            self.step = self._learned_step(None)
        low, high = fixed_range if fixed_range is not None else (float("inf"), float("-inf"))
        self.register_buffer("min_val", torch.tensor(low, dtype=torch.float32))
        self.register_buffer("max_val", torch.tensor(high, dtype=torch.float32))
        self.register_buffer("batches", torch.tensor(0))
        self.register_buffer("nonfinite_batches", torch.tensor(0), persistent=False)
        if factory_kwargs:  # upstream's prepare creates many of these, and moving takes longer than the rest
            self.to(factory_kwargs.get("device"))

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is in the middle of the grid."""
        return self.grid.symmetric

    @property
    def per_channel(self) -> bool:
        """Whether each channel has its own scale."""
        return self.grid.per_channel

    @property
    def observed(self) -> bool:
        """Whether the range is observed from batches, rather than a weight's or fixed."""
        return isinstance(self.origin, ObservedRange)

    @property
    def of_batch(self) -> bool:
        """Whether the range is the average of ranges chosen from each batch."""
        return isinstance(self.origin, ObservedRange) and self.origin.choose_of_batch is not None

    @property
    def ends_suffice(self) -> bool:
        """Whether smallest and largest value are enough to update the range, without all other values."""
        return self.histogram is None and not self.of_batch

    @property
    def seen(self) -> bool:
        """Whether a range is known. Without one nothing is rounded, and layers that need it stay float."""
        # Reading it breaks a compiled graph; `_round` avoids that unless a step has to begin to learn.
        if not self.origin.known and (self.learned != "none" or not torch.compiler.is_compiling()):
            self.origin.known = self.learns or self.origin.is_in(self)
        return self.origin.known

    @property
    def learns(self) -> bool:
        """Whether scale and zero point are parameters by now."""
        return self.step is not None and self.step.learns

    @property
    def activation_post_process(self) -> FakeQuantize:
        """Itself: upstream's converters expect the observer inside a fake-quantize."""
        return self

    @torch.no_grad()
    def materialize(self, weight: Tensor) -> None:
        """Create the tensors of a weight's FakeQuantize whose shape depends on the number of channels.

        Args:
            weight: The weight as it will be passed to `forward`.
        """
        channels = weight.shape[self.ch_axis] if self.per_channel else None
        if self.clipped and "clip" not in self._buffers:
            self.register_buffer("clip", torch.zeros(() if channels is None else channels, device=weight.device))
        if self.learned != "none" and self.step is None:
            self.step = self._learned_step(channels).to(weight.device)

    def take_grid(self, grid: IntegerGrid, *, clipped: bool) -> None:
        """Replace the grid, before anything was observed; weights have to be materialized afterwards.

        Args:
            grid: The new grid, of the same dtype.
            clipped: Whether the range of a weight is the share with the least mean squared error.
        """
        self.grid, self.clipped = grid, clipped
        self.qscheme, self.ch_axis = grid.qscheme, grid.ch_axis
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max
        constant, percentile = self.averaging_constant, self.percentile
        self.origin = range_of(self.source, constant=constant, percentile=percentile, grid=grid)
        self._buffers.pop("clip", None)
        if self.source == "present":
            self.step = None
        elif self.step is not None:
            self.step.take_limits(grid.quant_min, grid.quant_max)

    def _learned_step(self, channels: int | None) -> LearnedStep:
        moves = self.learned == "lsq+" and self.observed and not self.symmetric
        grid = {"quant_min": self.quant_min, "quant_max": self.quant_max}
        return LearnedStep(channels, **grid, learn_zero_point=moves, rate=self.learned_rate)

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest representable value, float32, shape ``()`` or ``(channels,)``."""
        if self.learns:
            scale, zero_point = self.calculate_qparams()
            return (self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale
        if isinstance(self.origin, PresentRange):
            if self.origin.ends is None:
                raise RuntimeError("A weight's FakeQuantize has a range only after it has seen the weight.")
            return self.origin.ends
        return self.min_val, self.max_val

    @torch.no_grad()
    def observe(self, x: Tensor, relu: float | None = None) -> None:
        """Update the range with ``x``; a non-finite range is counted and left out.

        Args:
            x: Values of any shape and floating dtype.
            relu: Upper limit of a ReLU that is still to be applied to ``x`` (6 for ReLU6, inf for ReLU); None for no
                ReLU.
        """
        values = x.detach().float()
        if isinstance(self.origin, PresentRange):
            if self.clipped and not self.origin.share_known:
                self.materialize(values)
            self.origin.observe(values, self.grid, self.clip if self.clipped else None)
        elif isinstance(self.origin, ObservedRange):
            self._observe_batch(self.origin, values, relu)

    def _observe_batch(self, origin: ObservedRange, values: Tensor, relu: float | None) -> None:
        reduce = self.reduce_across_processes and process_count() > 1
        empty = values.numel() == 0
        if empty and not reduce:
            return
        # A process without values takes part too, because the others wait for it.
        low, high = smallest_and_largest(values.new_full((1,), torch.nan) if empty else values)
        if relu is not None:
            low, high = low.clamp(0.0, relu), high.clamp(0.0, relu)
        finite = here = (low > -torch.inf) & (high < torch.inf)
        self.nonfinite_batches.add_(~finite & (not empty))
        largest = self.grid.largest
        low, high = low.clamp(-largest, largest), high.clamp(-largest, largest)
        if reduce:
            low, high, finite = range_over_all(low, high, finite)
        if self.histogram is not None and bool(here):
            self.histogram.observe(values)
        if origin.choose_of_batch is not None:
            counts = batch_histogram(values, low, high, relu) * here
            low, high = origin.choose_of_batch(sum_over_all(counts) if reduce else counts, low, high)
        in_forward = self.course is not None and self.course.in_forward
        origin.move(self, low, high, finite, in_forward=in_forward)

    @torch.no_grad()
    def take_share(self, share: Tensor) -> None:
        """Represent this share of a weight's range from now on, if the weight has been seen.

        Args:
            share: In (0, 1], float32, of the shape of the buffer ``clip``.
        """
        assert isinstance(self.origin, PresentRange)
        self.clip.copy_(share)
        self.origin.share_known = True

    def begin_forward(self) -> None:
        """Begin a new forward pass: what was seen before does not belong to it."""
        if isinstance(self.origin, ObservedRange):
            self.origin.passed = None

    def begins_at_zero(self, largest: float) -> None:
        """Restrict a learned grid to the output of the ReLU before it, which conversion drops since the grid clamps.

        Args:
            largest: Upper limit of the ReLU, such as 6; inf for none.
        """
        if self.step is not None:
            self.step.begins_at_zero(largest)

    def hold(self) -> None:
        """Keep the range of the present weight from now on: conversion rounds the weight before it packs it."""
        if isinstance(self.origin, PresentRange):
            self.origin.held = True

    @torch.no_grad()
    def settle(self) -> None:
        """Choose the range from the histogram of all batches, if that is the source; ends calibration."""
        if isinstance(self.origin, ObservedRange) and self.histogram is not None and self.seen:
            self.origin.settle(self, self.histogram)

    @torch.no_grad()
    def forget(self) -> None:
        """Discard the observed range, to observe again."""
        if not isinstance(self.origin, ObservedRange):
            return
        self.origin.forget(self)
        if self.histogram is not None:
            self.histogram = Histogram().to(self.min_val.device)

    @torch.no_grad()
    def widen_to(self, other: FakeQuantize) -> None:
        """Extend the own range by that of another FakeQuantize."""
        assert isinstance(self.origin, ObservedRange)
        low, high = (end.to(self.min_val.device) for end in other.range())
        self.origin.widen(self, low, high, other.batches.to(self.batches.device))

    def forward(self, x: Tensor, factor: Tensor | None = None, axis: int = 0, *, relu: float | None = None) -> Tensor:
        """``x`` before fake-quantization is enabled; afterwards ``x`` on the grid, in the same shape and dtype.

        Args:
            x: Values of any shape and floating dtype.
            factor: For a weight whose BatchNorm is folded: float32, shape ``(channels,)``, without gradient. ``x *
                factor`` is rounded and divided by ``factor`` again; where it is 0, or so small that dividing by it
                overflows, the result is ``x``.
            axis: The channel dimension that ``factor`` belongs to.
            relu: Upper limit of a ReLU that is applied to ``x`` first (6 for ReLU6, inf for ReLU); None for no ReLU.
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
        if isinstance(self.origin, PresentRange):
            if self.fake_quant_enabled:
                self.observe(x)
        elif self.observes:
            self.observe(x, relu)
        return self._round(x, clamps=not self._holds_all, relu=relu)

    @property
    def _rounds_relu(self) -> bool:
        """Whether a ReLU before it can be fused with the rounding now."""
        plain = self.observed and self.histogram is None and self.learned == "none"
        return plain and self.fake_quant_enabled and not self.left_float and self.seen

    @property
    def _holds_all(self) -> bool:
        """Whether the grid covers all values of the present weight, so that nothing is clamped."""
        held = not isinstance(self.origin, PresentRange) or self.origin.held
        return not held and not self.clipped and self.learned == "none" and self.symmetric

    def _round_folded(self, weight: Tensor, factor: Tensor, axis: int) -> Tensor:
        if self._holds_all and (not self.per_channel or self.ch_axis == axis):
            assert isinstance(self.origin, PresentRange)
            self.origin.take(*self.grid.folded_ends(weight.detach(), factor, axis))
            scale, _ = self.calculate_qparams()
            return fake_quantize_folded(weight, factor, scale, axis=axis)
        factor = along(factor, weight, axis)
        dead = (1.0 / factor).isinf()
        folded = self.forward(weight.float() * factor)
        return torch.where(dead, weight.float(), folded / torch.where(dead, 1.0, factor)).to(weight.dtype)

    @property
    def observes(self) -> bool:
        """Whether `forward` updates the range now."""
        here = self._trains or self.observe_in_evaluation
        return self.observer_enabled and here and self.observed and not recomputes()

    @property
    def _trains(self) -> bool:
        """Whether the input belongs to training, also in a part that is kept in evaluation."""
        return self.training or (self.course is not None and self.course.trains)

    def _beginning(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point with which the step begins to learn now; None if it does not begin."""
        if self.step is None or self.step.learns or not (self._trains and self.may_learn):
            return None
        if self.is_shared and isinstance(self.origin, ObservedRange) and self.origin.passed is not None:
            # What was seen so far in this forward pass is only a part of the batch.
            (low, high, batches), *_ = self.origin.passed
            return self.grid.qparams(low, high) if bool(batches) else None
        if isinstance(self.origin, ObservedRange) and self.quant_max - self.quant_min < 127:
            # A run in one process alone, such as a rehearsal, must not wait for the others.
            alike = self.reduce_across_processes and process_count() > 1
            return self.grid.qparams(*least_squares_of_batch(x, *self.range(), self.grid, of_first=alike))
        return self.calculate_qparams()

    def round(self, x: Tensor) -> Tensor:
        """`forward` without observing."""
        return self._round(x, clamps=True)

    def _round(self, x: Tensor, *, clamps: bool, relu: float | None = None) -> Tensor:
        if not self.fake_quant_enabled or self.left_float:
            return x
        if not decided_once(lambda: self.seen):
            # While a graph is traced, whether a range is known may change: then the graph reads it.
            known = self.min_val <= self.max_val if torch.compiler.is_compiling() and self.observed else None
            return x if known is None else torch.where(known, self._on_grid(x, clamps=clamps), x)
        if self.step is not None:
            beginning = self._beginning(x)
            if beginning is not None:
                self.step.begin(*beginning)
            if self.step.learns:
                return self.step.round(x, axis=self.grid.axis, is_weight=self.source == "present")
        return self._on_grid(x, clamps=clamps, relu=relu)

    def _on_grid(self, x: Tensor, *, clamps: bool, relu: float | None = None) -> Tensor:
        scale, zero_point = decided_once(self.calculate_qparams)
        return self.grid.round(x, scale, zero_point, clamps=clamps, relu=relu)

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) of the present range, used by training and read by conversion."""
        if self.step is not None and self.step.learns:
            return self.step.qparams()
        return self.grid.qparams(*self.range())

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch rounding on or off."""
        self.fake_quant_enabled = bool(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch updates of the range on or off."""
        self.observer_enabled = bool(enabled)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        """Move to another device; ranges stay float32 in any precision of the network."""
        move_only(self, fn)
        for child in self.children():
            child._apply(fn)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.look_again()

    def look_again(self) -> None:
        """Read the buffers again, which were changed from outside: what is known of them is cached."""
        self.origin.look_again()
        if self.step is not None:
            self.step.look_again()

    def extra_repr(self) -> str:
        """Grid and range, for ``print(network)``."""
        return f"{self.grid}, {self.source}{'' if self.learned == 'none' else f', {self.learned}'}"

    @property
    def storage_dtype(self) -> torch.dtype:
        """The quantized dtype of the same integers: ``torch.quint8`` or ``torch.qint8``."""
        return self.grid.storage_dtype
