"""A range for each batch of a training, chosen from a histogram of that batch.

Calibration keeps one histogram of all batches, since its network does not change. In training the network changes, so
old batches say little, and a decaying histogram would be additional state in every checkpoint and process. Here each
batch has its own histogram, the range is chosen from it, and the moving average of these ranges is kept: two numbers,
as for ``"moving_average"``, which are resumed, frozen and reduced over processes in the same way. No value is read back
from the device, so a step never waits for it, and a compiled graph holds the whole computation.

The average of each batch's percentiles is what NNCF calls ``mean_percentile`` and Brevitas collects for its learned
scales; the least squared error is that of `qat_lightning.numerics.observers.least_squares_range`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qat_lightning.numerics.integer_grid import IntegerGrid

BINS = 2048
"""Number of bins in the histogram of a batch; the histogram is as wide as the batch's range."""

SAMPLED = 2**16
"""About how many values of a batch are counted, evenly spaced; smallest and largest are those of the whole batch."""

_RATIO, _TRIED = 0.87, 20
"""The search for the least error tries shares of the range, each 13 % smaller, down to 7 %; then around the best."""

_LARGE = 2.0**50

ChooseOfBatch = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Chooses a range from the histogram of a batch and its smallest and largest value."""


def sample(values: Tensor) -> Tensor:
    """About `SAMPLED` of the values, evenly spaced in memory.

    The stride has no common divisor with the number of values, so that no column or channel is skipped.

    Args:
        values: Values of any shape and memory format.

    Returns:
        A one-dimensional tensor; all values if there are no more than that.

    Example:
        >>> sample(torch.zeros(8, 64, 32, 32)).shape, sample(torch.zeros(3, 4)).shape
        (torch.Size([58255]), torch.Size([12]))
    """
    count = values.numel()
    distance = max(1, count // SAMPLED)
    while math.gcd(distance, count) != 1:
        distance += 1
    order = sorted(range(values.dim()), key=lambda dim: -values.stride()[dim])
    return values.permute(order).reshape(-1)[::distance]


def batch_histogram(values: Tensor, low: Tensor, high: Tensor, relu: float | None = None) -> Tensor:
    """Count a sample of the values in `BINS` equal bins from ``low`` to ``high``.

    Args:
        values: float32, of any shape.
        low: Smallest value, float32, shape ``()``; with a ReLU, after the ReLU.
        high: Largest value, likewise.
        relu: Upper limit of a ReLU that is still to be applied to the values (6 for ReLU6, inf for ReLU); None for no
            ReLU.

    Returns:
        float32, shape ``(BINS,)``, on the device of the values.

    Example:
        >>> counts = batch_histogram(torch.tensor([0.0, 1.0, 1.0]), torch.tensor(0.0), torch.tensor(1.0))
        >>> int(counts[0]), int(counts[-1])
        (1, 2)
    """
    seen = sample(values)
    if relu is not None:
        seen = seen.clamp(0.0, relu)
    # Halves: the difference of values near float32's largest would overflow. Halving is exact.
    bins = (seen / 2 - low / 2) * (BINS / (high / 2 - low / 2))
    bins = bins.nan_to_num(0.0).clamp(0, BINS - 1).long()
    # Whole numbers in float32: the sum does not depend on the order.
    counts = torch.zeros(BINS, dtype=torch.float32, device=values.device)
    return counts.scatter_add_(0, bins, torch.ones_like(seen))


def percentile_of_batch(counts: Tensor, low: Tensor, high: Tensor, *, percentile: float) -> tuple[Tensor, Tensor]:
    """The range that leaves ``100 - percentile`` percent of a batch out on each side.

    Args:
        counts: See `batch_histogram`.
        low: Smallest value of the batch.
        high: Largest.
        percentile: In percent, above 50.

    Returns:
        Smallest and largest value to represent, float32, shape ``()``.

    Example:
        >>> values = torch.cat([torch.linspace(0, 1, 10000), torch.tensor([9.0])])
        >>> counts = batch_histogram(values, values.min(), values.max())
        >>> low, high = percentile_of_batch(counts, values.min(), values.max(), percentile=99.9)
        >>> bool(high < 1.01)
        True
    """
    total = counts.cumsum(0)
    ends = []
    for share, is_low in ((1.0 - percentile / 100.0, True), (percentile / 100.0, False)):
        wanted = (share * total[-1:]).contiguous()
        index = torch.searchsorted(total, wanted, right=is_low).clamp(max=BINS - 1)
        inside = 1.0 - (total[index] - wanted) / counts[index].clamp(min=1.0)
        ends.append(_at(index + inside.clamp(0.0, 1.0), BINS, low, high).squeeze(0))
    return torch.maximum(ends[0], low), torch.minimum(ends[1], high)


def least_squares_of_histogram(
    counts: Tensor, low: Tensor, high: Tensor, *, grid: IntegerGrid
) -> tuple[Tensor, Tensor]:
    """The part of a batch's range whose grid has the least mean squared error on it.

    Both ends are tried together, then each alone, and at last both a little nearer and farther.

    Args:
        counts: See `batch_histogram`.
        low: Smallest value of the batch.
        high: Largest.
        grid: The integer grid.

    Returns:
        Smallest and largest value to represent, float32, shape ``()``.

    Example:
        >>> grid = IntegerGrid(torch.uint8, 0, 15, torch.per_tensor_affine)
        >>> values = torch.cat([torch.linspace(0, 1, 10000), torch.tensor([9.0])])
        >>> counts = batch_histogram(values, values.min(), values.max())
        >>> low, high = least_squares_of_histogram(counts, values.min(), values.max(), grid=grid)
        >>> float(low), bool(high < 4)
        (0.0, True)
    """
    # Squares of larger values would overflow.
    unit = torch.maximum(-low, high).clamp(min=_LARGE) / _LARGE
    at_low, at_high = _least_squares(counts, low / unit, high / unit, grid)
    return at_low * unit, at_high * unit


def _least_squares(counts: Tensor, low: Tensor, high: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    # Merge pairs of bins: errors need fewer bins than percentiles do.
    counts = counts.reshape(-1, 2).sum(1)
    middles = _at(torch.arange(BINS // 2, device=counts.device) + 0.5, BINS // 2, low, high)
    shares = _RATIO ** torch.arange(_TRIED, device=counts.device)
    nearby = torch.linspace(0.94, 1.06, 5, device=counts.device)

    def best(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = (found[:, None] for found in grid.qparams(lows, highs))
        least, most = grid.quant_min - zero_point, grid.quant_max - zero_point
        rounded = torch.clamp(torch.round(middles / scale), least, most) * scale
        # One-dimensional: an index without dimensions would be read back from the device.
        chosen = ((rounded - middles).square() * counts).sum(1).argmin(0, keepdim=True)
        return lows[chosen].squeeze(0), highs[chosen].squeeze(0)

    if grid.symmetric:
        largest = torch.maximum(-low, high).clamp(min=0.0)
        _, found = best(-largest * shares, largest * shares)
        _, found = best(-found * nearby, found * nearby)
        return torch.maximum(low, -found), torch.minimum(high, found)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    at_low, at_high = best(low * shares, high * shares)
    _, at_high = best(at_low.expand_as(shares), high * shares)
    at_low, _ = best(low * shares, at_high.expand_as(shares))
    return best((at_low * nearby).clamp(min=low), (at_high * nearby).clamp(max=high))


def _at(bins: Tensor, count: int, low: Tensor, high: Tensor) -> Tensor:
    """The value that is ``bins`` bins above ``low``, where ``count`` bins reach from ``low`` to ``high``."""
    low, high = low / 2, high / 2  # as in `batch_histogram`
    return 2 * (low + bins * ((high - low) / count))
