"""Detecting unreliable latencies, measured while other work was running."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from qat_lightning.compare.run import Run
from qat_lightning.compare.settings import training_of
from qat_lightning.compare.spread import Spread
from qat_lightning.run.evaluate import SPREAD

LARGEST_SPREAD = 0.25
"""Largest relative deviation of a latency over seeds, and largest relative interquartile range of one measurement."""

LARGEST_RATIO = 1.5
"""Largest ratio between latencies of the same float network in different runs."""

# Settings of training, by the names that are usual for them, which change neither the network nor its inputs
_NAMES = (
    *("trainer", "callbacks", "optimizer", "scheduler", "lr_scheduler", "lr", "learning_rate", "weight_decay"),
    *("label_smoothing", "epochs", "max_epochs", "batch_size", "num_workers", "pin_memory", "tags", "task_name"),
)
_NOT_THE_NETWORK = tuple(glob for name in _NAMES for glob in (name, f"{name}.*", f"*.{name}", f"*.{name}.*"))


def network_settings(run: Run, ignore: Sequence[str] = ()) -> str:
    """Return the settings that may affect the float network or the shapes of its inputs, as text.

    These are all settings of float training but those known to affect neither: a network that is not recognized only
    has fewer latencies to be compared with.

    Args:
        run: The run.
        ignore: Globs of further keys to leave out.

    Example:
        >>> network_settings(Run("a", "a", config={"lr": 0.1, "data": {"image_size": 32, "batch_size": 8}}))
        "[('data.image_size', '32')]"
    """
    return training_of(run, (*ignore, *_NOT_THE_NETWORK))


def fastest_floats(runs: Iterable[Run], ignore: Sequence[str] = ()) -> dict[Hashable, float]:
    """Return the lowest latency of each float network, identified by size and settings: on the least busy machine.

    Args:
        runs: The runs.
        ignore: Globs of settings that do not count as a difference.
    """
    found: dict[Hashable, float] = {}
    for run in runs:
        key, latency = _float_network(run, ignore), run.metrics.get("float/latency_ms")
        if key is not None and latency is not None:
            found[key] = min(latency, found.get(key, latency))
    return found


def why_noisy(
    runs: Sequence[Run],
    latency: Spread | None,
    speedup: Spread | None,
    fastest: Mapping[Hashable, float],
    ignore: Sequence[str] = (),
) -> str:
    """Return why the latency of a configuration is unreliable; empty if it is reliable.

    Args:
        runs: The runs of the configuration.
        latency: The latency over seeds.
        speedup: The speedup over seeds.
        fastest: Result of `fastest_floats` for all runs.
        ignore: The globs given to it.

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
    ratio = max((_ratio(run, fastest, ignore) for run in runs), default=1.0)
    if ratio > LARGEST_RATIO:
        return f"float took {ratio:.1f} times as long in one run as in another"
    return ""


def _ratio(run: Run, fastest: Mapping[Hashable, float], ignore: Sequence[str]) -> float:
    key, latency = _float_network(run, ignore), run.metrics.get("float/latency_ms")
    return 1.0 if key is None or latency is None else latency / fastest[key]


def _float_network(run: Run, ignore: Sequence[str]) -> tuple[float, str] | None:
    size = run.metrics.get("float/size_mb")
    return None if size is None else (round(size, 3), network_settings(run, ignore))
