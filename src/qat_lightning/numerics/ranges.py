"""Sources of the range of a FakeQuantize: the current weight, the batches so far, or a fixed range.

The part of a range that a checkpoint holds is in buffers of the FakeQuantize. Here is how it is updated, and the state
between two calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from qat_lightning.numerics.batch_ranges import ChooseOfBatch, least_squares_of_histogram, percentile_of_batch
from qat_lightning.numerics.integer_grid import IntegerGrid
from qat_lightning.numerics.observers import (
    Histogram,
    entropy_range,
    least_squares_clip,
    least_squares_range,
    percentile_range,
)

RangeSource = Literal[
    "moving_average",
    "min_max",
    "histogram_mse",
    "histogram_kl",
    "percentile",
    "batch_mse",
    "batch_percentile",
    "present",
    "fixed",
]

Choose = Callable[[Histogram, float, float], tuple[float, float]]
"""Chooses a range from the histogram of all values and their smallest and largest value."""

FROM_HISTOGRAM = ("histogram_mse", "histogram_kl", "percentile")
"""The sources that choose a range from the histogram of all batches."""


class Kept(Protocol):
    """Storage of an observed range: buffers of a FakeQuantize, float32 and int64, of shape ``()``."""

    min_val: Tensor
    max_val: Tensor
    batches: Tensor


class FixedRange:
    """A range that is known beforehand."""

    known = True
    """Whether a range is known; without one nothing is rounded."""

    def is_in(self, kept: Kept) -> bool:
        """Whether the buffers hold a range."""
        return True

    def look_again(self) -> None:
        """Nothing is cached."""


class PresentRange:
    """The range of the current weight. It is never a step old, and never loaded or averaged.

    Attributes:
        known: Whether a weight was seen since the last load.
        held: Whether the range is kept for all later weights: conversion rounds a weight before it packs it.
        share_known: Whether the represented share of the range was looked up since the last load.
        ends: Smallest and largest value; None before the first weight.
    """

    def __init__(self) -> None:
        self.known = False
        self.held = False
        self.share_known = False
        self.ends: tuple[Tensor, Tensor] | None = None

    def observe(self, weight: Tensor, grid: IntegerGrid, share: Tensor | None) -> None:
        """Compute the range of a weight, unless it is held.

        Args:
            weight: Float32.
            grid: The integer grid.
            share: The represented share of the range, for each scale; 0 where it is yet to be chosen (by the least mean
                squared error of this weight); None for the whole range.
        """
        if self.held:
            return None
        low, high = grid.ends(weight)
        if share is None:
            return self.take(low, high)
        if not self.share_known:
            if not bool(share.all()):
                values = grid.by_channel(weight)
                chosen = least_squares_clip(
                    values, quant_min=grid.quant_min, quant_max=grid.quant_max, symmetric=grid.symmetric
                )
                share.copy_(chosen.reshape(share.shape))
            self.share_known = True
        return self.take(low * share, high * share)

    def take(self, low: Tensor, high: Tensor) -> None:
        """Set the range."""
        self.ends = low, high
        self.known = True

    def is_in(self, kept: Kept) -> bool:
        """Always False: no buffer holds it."""
        return False

    def look_again(self) -> None:
        """A weight was loaded: compute the range again."""
        self.known = self.share_known = False


class ObservedRange:
    """The range of the batches so far.

    Args:
        constant: Weight of the newest batch in a moving average, after the first batches. Before, the weight is 9 / (10
            + batches seen), as in ``tf.train.ExponentialMovingAverage(num_updates=…)``, so that ranges follow a network
            that still changes quickly. None for the smallest and largest value of all batches.
        choose: Chooses the range from a histogram of all batches and its ends; None to use the ends.
        choose_of_batch: Chooses the range of each batch from its histogram and ends; None to use the ends.

    Attributes:
        known: Whether the buffers are known to hold a range; cached, since reading them synchronizes a GPU.
        passed: State of the current forward pass: the buffers before it, and the ends of all inputs since; None before
            the first.

    Example:
        >>> from types import SimpleNamespace
        >>> kept = SimpleNamespace(
        ...     min_val=torch.tensor(torch.inf), max_val=torch.tensor(-torch.inf), batches=torch.tensor(0)
        ... )
        >>> averaged, finite = ObservedRange(constant=0.01), torch.tensor(True)
        >>> for high in (1.0, 2.0):
        ...     averaged.move(kept, torch.tensor(0.0), torch.tensor(high), finite, in_forward=False)
        >>> round(float(kept.max_val), 3), averaged.is_in(kept)
        (1.818, True)
    """

    def __init__(
        self, constant: float | None, choose: Choose | None = None, choose_of_batch: ChooseOfBatch | None = None
    ) -> None:
        self.constant, self.choose, self.choose_of_batch = constant, choose, choose_of_batch
        self.known = False
        self.passed: tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor] | None = None

    def is_in(self, kept: Kept) -> bool:
        """Whether the buffers hold a range."""
        return bool(kept.min_val <= kept.max_val)

    def look_again(self) -> None:
        """The buffers were loaded or changed: read them again."""
        self.known = False

    def move(self, kept: Kept, low: Tensor, high: Tensor, finite: Tensor, *, in_forward: bool) -> None:
        """Update the range with a batch.

        Args:
            kept: The buffers to update.
            low: Smallest value of the batch.
            high: Largest value of the batch.
            finite: Whether both are finite; if not, nothing is updated.
            in_forward: Whether this may be one of several parts of a forward pass.
        """
        before = kept.min_val, kept.max_val, kept.batches
        if in_forward:
            low, high, finite, before = self._of_whole_forward(kept, low, high, finite)
        if self.constant is None:
            ends = torch.minimum(low, kept.min_val), torch.maximum(high, kept.max_val)
        else:
            ends = self._average(self.constant, low, high, *before)
        for buffer, old, new in zip((kept.min_val, kept.max_val), before, ends, strict=False):
            buffer.copy_(torch.where(finite, new, old))
        kept.batches.copy_(before[2] + finite)

    def _of_whole_forward(
        self, kept: Kept, low: Tensor, high: Tensor, finite: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The range of all inputs of this forward pass so far, and range and count before it.

        A layer that is called several times sees one batch in parts: the average is updated once, with their union.
        Each part recomputes that update from the state before the pass.
        """
        low, high = torch.where(finite, low, torch.inf), torch.where(finite, high, -torch.inf)
        if self.passed is None:
            before = kept.min_val.clone(), kept.max_val.clone(), kept.batches.clone()
        else:
            before, others_low, others_high = self.passed
            low, high = torch.minimum(low, others_low), torch.maximum(high, others_high)
        self.passed = before, low, high
        return low, high, low <= high, before

    def _average(
        self, constant: float, low: Tensor, high: Tensor, before_low: Tensor, before_high: Tensor, batches: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight = (9.0 / (batches + 10)).clamp(min=constant)
        first = batches == 0
        # Halves: the difference of values near float32's largest would overflow. Halving and doubling is exact.
        low_half, high_half = before_low / 2, before_high / 2
        average_low = 2 * (low_half + weight * (low / 2 - low_half))
        average_high = 2 * (high_half + weight * (high / 2 - high_half))
        return torch.where(first, low, average_low), torch.where(first, high, average_high)

    def settle(self, kept: Kept, histogram: Histogram) -> None:
        """Choose the range from the histogram of all batches."""
        assert self.choose is not None
        low, high = self.choose(histogram, float(kept.min_val), float(kept.max_val))
        kept.min_val.fill_(low)
        kept.max_val.fill_(high)

    def forget(self, kept: Kept) -> None:
        """Discard all batches."""
        kept.min_val.fill_(torch.inf)
        kept.max_val.fill_(-torch.inf)
        kept.batches.zero_()
        self.known = False

    def widen(self, kept: Kept, low: Tensor, high: Tensor, batches: Tensor) -> None:
        """Extend the range by another one."""
        kept.min_val.copy_(torch.minimum(kept.min_val, low))
        kept.max_val.copy_(torch.maximum(kept.max_val, high))
        kept.batches.copy_(torch.maximum(kept.batches, batches))
        self.known = False


def range_of(
    source: RangeSource, *, constant: float, percentile: float, grid: IntegerGrid
) -> FixedRange | PresentRange | ObservedRange:
    """Create the object that manages the range of a source.

    Args:
        source: The source of the range.
        constant: Constant of the moving average; see `ObservedRange`.
        percentile: Percentage of the values that ``"percentile"`` and ``"batch_percentile"`` keep on each side.
        grid: The integer grid.
    """
    least, most = grid.quant_min, grid.quant_max
    choose: dict[RangeSource, Choose] = {
        "percentile": partial(_within_percentile, percentile=percentile),
        "histogram_kl": partial(entropy_range, levels=most - least + 1, symmetric=grid.symmetric),
        "histogram_mse": partial(
            least_squares_range, symmetric=grid.symmetric, quant_min=grid.quant_min, quant_max=grid.quant_max
        ),
    }
    if source == "fixed":
        return FixedRange()
    if source == "present":
        return PresentRange()
    of_batch: dict[RangeSource, ChooseOfBatch] = {
        "batch_percentile": partial(percentile_of_batch, percentile=percentile),
        "batch_mse": partial(least_squares_of_histogram, grid=grid),
    }
    averages = source == "moving_average" or source in of_batch
    return ObservedRange(constant if averages else None, choose.get(source), of_batch.get(source))


@torch.no_grad()
def least_squares_of_batch(
    x: Tensor, low: Tensor, high: Tensor, grid: IntegerGrid, *, of_first: bool = False
) -> tuple[Tensor, Tensor]:
    """The part of an observed range whose grid has the least mean squared error on the values of one batch.

    Args:
        x: The values, of any shape and floating dtype; those that are not finite are left out.
        low: Smallest value observed, float32, shape ``()``.
        high: Largest.
        grid: The integer grid.
        of_first: Whether to use the result of the first process in all of them; then all processes have to call this.

    Returns:
        Smallest and largest value to represent, float32, shape ``()``.

    Example:
        >>> grid = IntegerGrid(torch.uint8, 0, 15, torch.per_tensor_affine)
        >>> x = torch.cat([torch.linspace(0, 1, 10000), torch.tensor([9.0])])
        >>> low, high = least_squares_of_batch(x, x.min(), x.max(), grid)
        >>> float(low), bool(high < 4)
        (0.0, True)
    """
    values, histogram = x.detach().float().flatten(), Histogram()
    histogram.observe(values[torch.isfinite(values)])
    ends = (float(low), float(high))
    if float(histogram.limit):
        ends = least_squares_range(
            histogram, *ends, quant_min=grid.quant_min, quant_max=grid.quant_max, symmetric=grid.symmetric
        )
    found = torch.tensor(ends, dtype=torch.float32, device=low.device)
    if of_first:
        torch.distributed.broadcast(found, src=0)
    return found[0], found[1]


def _within_percentile(histogram: Histogram, low: float, high: float, percentile: float) -> tuple[float, float]:
    # Within a bin at an end of the range, both may lie beyond it.
    inner_low, inner_high = (min(max(end, low), high) for end in percentile_range(histogram, percentile))
    return inner_low, inner_high
