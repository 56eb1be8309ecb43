"""Range selection for calibration: histograms that accumulate batches exactly, and ranges chosen from them.

A histogram has an even number of equal bins around 0. Its limit is a power of two that doubles when a value exceeds it:
pairs of bins then merge exactly. So the sum of the histograms of several batches or processes is the histogram of all
values, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat_lightning.numerics.grid import choose_qparams
from qat_lightning.numerics.learned_step import move_only

BINS = 4096
"""Half of them on each side of 0. The side with the largest value uses more than half of its bins."""

_STEPS = 100
"""Number of candidate ranges in the search for the least error, on each side."""


class Histogram(nn.Module):
    """Counts values in equal bins on both sides of 0.

    Attributes:
        counts: float64 buffer of shape ``(BINS,)``.
        limit: float64 buffer of shape ``()``: bins cover ``[-limit, limit]``; 0 before the first value. The power of
            two above float32's largest values is not a float32.

    Example:
        >>> histogram = Histogram()
        >>> histogram.observe(torch.tensor([0.5, 3.0]))
        >>> histogram.limit.item(), int(histogram.counts.sum())
        (4.0, 2)
    """

    counts: Tensor
    limit: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("limit", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def observe(self, values: Tensor) -> None:
        """Count finite float32 values of any shape."""
        if not values.numel():
            return
        largest = max(float(values.max()), -float(values.min()))
        wanted = power_of_two_above(largest)
        present = float(self.limit)
        if wanted > present:
            if present:
                self.counts.copy_(_coarser(self.counts, round(math.log2(wanted / present))))
            self.limit.fill_(wanted)
            present = wanted
        # On the CPU: elsewhere the count has no deterministic kernel.
        counted = sum(_counts_of(part, present) for part in _in_order_of_memory(values).float().cpu().split(_PART))
        self.counts.add_(counted.to(self.counts))  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Histogram:
        """Move to another device; counts and limit stay float64 in any precision of the network."""
        move_only(self, fn)
        return self

    def centers(self) -> Tensor:
        """The middle of each bin, float64, shape ``(BINS,)``."""
        width = 2.0 * float(self.limit) / BINS
        return (torch.arange(BINS, dtype=torch.float64) - BINS / 2 + 0.5) * width


_PART = 2**18
"""Number of values that are counted at a time, so that they stay in the cache: several times as fast as all at once."""


def _counts_of(values: Tensor, limit: float) -> Tensor:
    """The number of values in each bin, int64; each bin includes the end farther from 0, so that bins merge exactly."""
    steps = values / (2.0 * limit / BINS)  # exact for a power of two
    # One float towards 0 for positive values: below the end of a bin, and so rounded down into it.
    steps.sub_(steps.clamp(min=0.0).mul_(2.0**-24)).floor_().add_(BINS // 2)
    return torch.bincount(steps.int(), minlength=BINS)


def _in_order_of_memory(values: Tensor) -> Tensor:
    """All values, flat, without a copy also for other memory formats such as channels_last."""
    return values.detach().permute(sorted(range(values.dim()), key=values.stride, reverse=True)).reshape(-1)


def power_of_two_above(value: float) -> float:
    """The smallest power of two that is at least ``value``; at least that of 1e-30.

    Example:
        >>> power_of_two_above(3.0), power_of_two_above(4.0)
        (4.0, 4.0)
    """
    mantissa, exponent = math.frexp(max(value, 1e-30))
    return float(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))


def _coarser(counts: Tensor, doublings: int) -> Tensor:
    """The same counts in bins that are ``2**doublings`` times as wide, around the same 0."""
    factor = 2 ** min(doublings, round(math.log2(BINS // 2)))
    merged = counts.reshape(-1, factor).sum(1)
    result = torch.zeros_like(counts)
    start = (BINS - merged.numel()) // 2
    result[start : start + merged.numel()] = merged
    return result


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """The range that leaves out ``100 - percentile`` percent of the values on each side.

    Args:
        histogram: Histogram of the values.
        percentile: In percent, above 50.

    Returns:
        Smallest and largest value, interpolated within their bins.
    """
    total = histogram.counts.cpu().cumsum(0)
    width = 2.0 * float(histogram.limit) / BINS
    ends = []
    for share, is_low in ((1.0 - percentile / 100.0, True), (percentile / 100.0, False)):
        wanted = share * float(total[-1])
        # side="left" finds the first bin that is not empty, also for a share of 0.
        index = int(torch.searchsorted(total, torch.tensor(wanted, dtype=total.dtype), right=is_low))
        index = min(index, BINS - 1)
        before = float(total[index - 1]) if index else 0.0
        inside = (wanted - before) / max(float(total[index]) - before, 1e-12)
        ends.append((index - BINS / 2 + min(max(inside, 0.0), 1.0)) * width)
    return ends[0], ends[1]


def least_squares_range(
    histogram: Histogram, low: float, high: float, *, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[float, float]:
    """The range whose grid has the least mean squared error on the values of a histogram.

    Both ends are tried in turn, from the smallest and largest value inwards (Choukroun et al., 2019, section 3;
    upstream's ``HistogramObserver`` searches for the same minimum).

    Args:
        histogram: Histogram of the values.
        low: Smallest value seen.
        high: Largest value seen.
        quant_min: Smallest integer of the grid.
        quant_max: Largest integer.
        symmetric: Whether the zero point is in the middle of the grid.

    Returns:
        Smallest and largest value to represent.
    """
    counts = histogram.counts.cpu()
    used = counts > 0
    centers, counts = histogram.centers()[used], counts[used]
    # Bins are wider than their contents: no value lies beyond the observed range.
    centers = centers.clamp(low, high)

    def best(lows: Tensor, highs: Tensor) -> int:
        scale, zero_point = choose_qparams(
            lows.float(), highs.float(), quant_min=quant_min, quant_max=quant_max, symmetric=symmetric
        )
        scale, zero_point = scale.double()[:, None], zero_point.double()[:, None]
        integers = (torch.round(centers / scale) + zero_point).clamp(quant_min, quant_max)
        error = ((integers - zero_point) * scale - centers).square()
        return int((error * counts).sum(1).argmin())

    shares = torch.linspace(1.0, 1.0 / _STEPS, _STEPS, dtype=torch.float64)
    at_low, at_high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        largest = max(-at_low, at_high)
        chosen = float(shares[best(-largest * shares, largest * shares)]) * largest
        return max(at_low, -chosen), min(at_high, chosen)
    whole_low, whole_high = at_low, at_high
    for _ in range(3):
        if whole_high > 0:
            at_high = float(shares[best(torch.full_like(shares, at_low), whole_high * shares)]) * whole_high
        if whole_low < 0:
            at_low = float(shares[best(whole_low * shares, torch.full_like(shares, at_high))]) * whole_low
    return at_low, at_high


def entropy_range(
    histogram: Histogram, low: float, high: float, *, levels: int, symmetric: bool
) -> tuple[float, float]:
    """The range whose quantized distribution is closest to that of the values, by Kullback-Leibler divergence.

    For each threshold the values beyond it are counted at the threshold, and the bins below it are merged into
    ``levels`` bins (Migacz, 8-bit inference with TensorRT, GTC 2017). Both signs share the threshold. As in NVIDIA's
    ``pytorch-quantization``, the bin at zero gets the count of the next bin, because the zeros of ReLU would otherwise
    dominate, and the largest of equally good thresholds is taken.

    Args:
        histogram: Histogram of the values.
        low: Smallest value seen.
        high: Largest value seen.
        levels: Number of integers of the grid.
        symmetric: Whether the zero point is in the middle of the grid: values of one sign then have half of them.

    Returns:
        Smallest and largest value to represent.
    """
    counts = histogram.counts.cpu()
    half = BINS // 2
    one_sided = low >= 0 or high <= 0
    if one_sided:
        sides = counts[half:] if low >= 0 else counts[:half].flip(0)
    else:
        sides = counts[half:] + counts[:half].flip(0)
    if symmetric:
        levels = (levels + 1) // 2
    elif not one_sided:
        levels = levels // 2
    last = int(sides.nonzero().max()) + 1 if sides.any() else 1
    sides = sides[:last].clone()
    if last > 1 and sides[1:].any():
        sides[0] = sides[1]
    best, threshold = math.inf, last
    for bins in range(min(max(levels, 1), last), last + 1):
        divergence = _divergence(sides, bins, levels)
        if divergence <= best:
            best, threshold = divergence, bins
    limit = float(histogram.limit) * threshold / half
    return max(min(low, 0.0), -limit), min(max(high, 0.0), limit)


def _divergence(counts: Tensor, bins: int, levels: int) -> float:
    """Divergence of the first ``bins`` bins, outliers in the last one, from the same bins merged into ``levels``."""
    inside = counts[:bins]
    reference = inside.clone()
    reference[-1] += counts[bins:].sum()
    level = (torch.arange(bins, dtype=torch.float64) * levels / bins).long().clamp(max=levels - 1)
    there = inside > 0
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    members = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, there.double())
    merged = torch.where(there, (sums / members.clamp(min=1))[level], 0.0)
    p, q = reference / reference.sum(), merged / merged.sum().clamp(min=1e-30)
    both = p > 0
    return float((p[both] * (p[both] / q[both].clamp(min=1e-10)).log()).sum())


def least_squares_clip(weight: Tensor, *, quant_min: int, quant_max: int, symmetric: bool) -> Tensor:
    """The share of each channel's range whose grid has the least mean squared error.

    Args:
        weight: float32, shape ``(channels, values)``.
        quant_min: Smallest integer of the grid.
        quant_max: Largest integer.
        symmetric: Whether the zero point is 0.

    Returns:
        float32 of shape ``(channels,)`` in (0, 1]: 1 for the range from the smallest to the largest value.

    Example:
        >>> weight = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([4.0])])[None]
        >>> bool(least_squares_clip(weight, quant_min=-7, quant_max=7, symmetric=True) < 0.6)
        True
    """
    low, high = torch.aminmax(weight, dim=1)
    best = torch.full_like(low, torch.inf)
    clip = torch.ones_like(low)
    for share in torch.linspace(1.0, 0.2, 81).tolist():
        scale, zero_point = choose_qparams(
            low * share, high * share, quant_min=quant_min, quant_max=quant_max, symmetric=symmetric
        )
        scale, zero_point = scale[:, None], zero_point[:, None]
        integers = (torch.round(weight / scale) + zero_point).clamp(quant_min, quant_max)
        error = ((integers - zero_point) * scale - weight).square().sum(1)
        better = error < best
        best, clip = torch.where(better, error, best), torch.where(better, share, clip)
    return clip
