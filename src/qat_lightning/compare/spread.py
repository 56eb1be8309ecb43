"""Mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable
from typing import NamedTuple


class Spread(NamedTuple):
    """A figure over seeds.

    Args:
        mean: The mean over seeds.
        deviation: The sample standard deviation (divided by seeds - 1), None for a single seed.
        seeds: The number of seeds.
    """

    mean: float
    deviation: float | None
    seeds: int


def spread(values: Iterable[tuple[Hashable, float]]) -> Spread | None:
    """Compute the mean and the sample standard deviation over seeds.

    Runs with the same seed are averaged first: repeating a run says nothing about other seeds.

    Args:
        values: A seed and a finite value for each run.

    Returns:
        The figure, None where there is no run.

    Example:
        >>> spread([(0, 0.5), (1, 1.0), (1, 2.0)])
        Spread(mean=1.0, deviation=0.7071067811865476, seeds=2)
        >>> spread([(0, 0.5)])
        Spread(mean=0.5, deviation=None, seeds=1)
    """
    of_seed: dict[Hashable, list[float]] = {}
    for seed, value in values:
        of_seed.setdefault(seed, []).append(value)
    means = [statistics.fmean(same) for same in of_seed.values()]
    if not means:
        return None
    return Spread(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None, len(means))
