"""Latencies that are measured again if other load on the machine disturbed them."""

from __future__ import annotations

from collections.abc import Callable

from qat_lightning.compare.noise import LARGEST_SPREAD
from qat_lightning.run.evaluate import SPREAD

_TIMES = 3


def quietest(measure: Callable[[], dict[str, float]], times: int = _TIMES) -> dict[str, float]:
    """The first measurement with steady latencies, or the steadiest one.

    Args:
        measure: Returns metrics, among them `SPREAD`: the interquartile range of latencies as a share of their median.
        times: The largest number of measurements.

    Example:
        >>> spreads = iter([0.9, 0.1, 0.0])
        >>> quietest(lambda: {SPREAD: next(spreads)})[SPREAD]
        0.1
    """
    found = [measure()]
    while is_noisy(found[-1]) and len(found) < times:
        found.append(measure())
    return min(found, key=lambda metrics: metrics.get(SPREAD, 0.0))


def is_noisy(metrics: dict[str, float]) -> bool:
    """Whether latencies varied too much during the measurement to be meaningful."""
    return metrics.get(SPREAD, 0.0) > LARGEST_SPREAD
