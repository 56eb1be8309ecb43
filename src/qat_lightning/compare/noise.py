"""Latencies that were measured beside other work, which say more of the work than of the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qat_lightning.compare.run import Run
from qat_lightning.compare.spread import Spread
from qat_lightning.run.evaluate import SPREAD

LARGEST_SPREAD = 0.25
"""Of a latency: the largest deviation over seeds, and interquartile range while it was measured, as shares of it."""

LARGEST_RATIO = 1.5
"""How many times longer than the fastest the same float network may take in another run."""


def fastest_floats(runs: Iterable[Run]) -> dict[float, float]:
    """The least latency of each float network, told apart by its size: the machine was the quietest then."""
    found: dict[float, float] = {}
    for run in runs:
        key, latency = _float_network(run), run.metrics.get("float/latency_ms")
        if key is not None and latency is not None:
            found[key] = min(latency, found.get(key, latency))
    return found


def why_noisy(
    runs: Sequence[Run], latency: Spread | None, speedup: Spread | None, fastest: Mapping[float, float]
) -> str:
    """Why the latency of a configuration is none to decide by; empty where nothing speaks against it.

    Args:
        runs: The runs of the configuration.
        latency: Over its seeds.
        speedup: Over its seeds.
        fastest: What `fastest_floats` found in all runs.

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
