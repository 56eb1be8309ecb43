"""Detecting unreliable latencies, measured while other work was running."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qat_lightning.compare.run import Run
from qat_lightning.compare.spread import Spread
from qat_lightning.run.evaluate import SPREAD

LARGEST_SPREAD = 0.25
"""Largest relative deviation of a latency over seeds, and largest relative interquartile range of one measurement."""

LARGEST_RATIO = 1.5
"""Largest ratio between latencies of the same float network in different runs."""


def fastest_floats(runs: Iterable[Run]) -> dict[float, float]:
    """Return the lowest latency of each float network, identified by its size: when the machine was least busy."""
    found: dict[float, float] = {}
    for run in runs:
        key, latency = _float_network(run), run.metrics.get("float/latency_ms")
        if key is not None and latency is not None:
            found[key] = min(latency, found.get(key, latency))
    return found


def why_noisy(
    runs: Sequence[Run], latency: Spread | None, speedup: Spread | None, fastest: Mapping[float, float]
) -> str:
    """Return why the latency of a configuration is unreliable; empty if it is reliable.

    Args:
        runs: The runs of the configuration.
        latency: The latency over seeds.
        speedup: The speedup over seeds.
        fastest: Result of `fastest_floats` for all runs.

    Example:
        >>> runs = [
        ...     Run(n, n, metrics={"float/latency_ms": t, "float/size_mb": 4.0}) for n, t in (("a", 2.0), ("b", 9.0))
        ... ]
        >>> why_noisy(runs[1:], None, None, fastest_floats(runs))
        'float took 4.5 times as long in one run as in another'
    """
    for name, figure in (("the latency", latency), ("the speed-up", speedup)):
        if figure is not None and figure.deviation is not None and figure.deviation > LARGEST_SPREAD * figure.mean:
            return f"{name} varies by {figure.deviation / figure.mean:.0%} over seeds"
    within = max((run.metrics.get(SPREAD, 0.0) for run in runs), default=0.0)
    if within > LARGEST_SPREAD:
        return f"it varied by {within:.0%} while it was measured"
    ratio = max((_ratio(run, fastest) for run in runs), default=1.0)
    if ratio > LARGEST_RATIO:
        return f"float took {ratio:.1f} times as long in one run as in another"
    return ""


def _ratio(run: Run, fastest: Mapping[float, float]) -> float:
    key, latency = _float_network(run), run.metrics.get("float/latency_ms")
    return 1.0 if key is None or latency is None else latency / fastest[key]


def _float_network(run: Run) -> float | None:
    size = run.metrics.get("float/size_mb")
    return None if size is None else round(size, 3)
