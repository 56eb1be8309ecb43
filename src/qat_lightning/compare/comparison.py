"""Grouping runs into configurations, and comparing these."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qat_lightning.compare.bare import with_bare_tests
from qat_lightning.compare.metric import Metric, choose_metric
from qat_lightning.compare.noise import fastest_floats, why_noisy
from qat_lightning.compare.pareto import pareto_front
from qat_lightning.compare.quantizing import NAME, quantizes, under_one_name
from qat_lightning.compare.run import Run, numbers
from qat_lightning.compare.settings import ABSENT, Setting, differing, flatten, seed_of, training_of, training_settings
from qat_lightning.compare.spread import Spread, spread
from qat_lightning.compare.tasks import ONLY_TASK, Task, tasks_of
from qat_lightning.errors import ConfigurationError
from qat_lightning.settings.variants import VARIANTS


@dataclass(frozen=True)
class Configuration:
    """Runs that differ only in the seed.

    Args:
        label: What distinguishes it from the others.
        values: The settings that differ, by label.
        runs: The runs that have the metric of the variant, in the order in which they were given.
        variant: The compared variant: ``int8`` if a run has it, else ``fake_quant``, else ``float``.
        score: The metric.
        drop: Difference to float, paired by seed, in the displayed unit. Negative if it is better than float. Its
            seeds are those with a baseline.
        latency_ms: Latency of one sample on the CPU.
        size_mb: Size of the file.
        speedup: Speed relative to float on the same machine, in the same run.
        agreement: Share of outputs with the same class as fake-quant.
        baseline: What ``drop`` is relative to.
        unpaired: Why no float run is its baseline, if there are float runs.
        noise: Why its latency is unreliable; empty if it is reliable.
        on_front: Whether no other of its task beats it in score, latency and size by more than a tolerance.
        task: Its data and metric, as far as configurations differ in them: scores compare only within a task.
    """

    label: str
    values: Mapping[str, str]
    runs: tuple[Run, ...]
    variant: str
    score: Spread
    drop: Spread | None = None
    latency_ms: Spread | None = None
    size_mb: Spread | None = None
    speedup: Spread | None = None
    agreement: Spread | None = None
    baseline: str = ""
    unpaired: str = ""
    noise: str = ""
    on_front: bool = False
    task: Task = ONLY_TASK

    @property
    def is_float(self) -> bool:
        """Whether it was to stay float, unlike a run with a quantizing callback of which only float has a score."""
        return self.variant == "float" and not any(quantizes(flatten(run.config)) for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Configurations side by side.

    Args:
        metric: The metric.
        settings: The settings in which configurations differ.
        configurations: Best score first, one task after the other.
        left_out: Runs that were not compared: failed, skipped, unfinished, unreadable, or without the metric
            of their configuration's variant.
    """

    metric: Metric
    settings: tuple[Setting, ...]
    configurations: tuple[Configuration, ...]
    left_out: tuple[Run, ...]

    @property
    def noisy(self) -> bool:
        """Whether a latency was measured while other work was running, so that latency is ignored."""
        return any(configuration.noise for configuration in self.configurations)

    @property
    def front(self) -> tuple[Configuration, ...]:
        """The configurations that no other of their task beats in score, latency and size."""
        return tuple(configuration for configuration in self.configurations if configuration.on_front)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of the configurations; a choice is made within one only."""
        return tuple(dict.fromkeys(configuration.task for configuration in self.configurations))


def compare(
    runs: Sequence[Run], *, metric: str | None = None, larger_is_better: bool | None = None, ignore: Sequence[str] = ()
) -> Comparison:
    """Compare runs: by configuration, over seeds, with float, and with each other.

    A run is compared with the float run that has the same data, network, training settings and seed, if there is one.
    If no run of its configuration has one, all are compared with their own ``float`` variant: from
    ``float_checkpoint=``, or the network at the step at which fake-quantization was enabled.

    Args:
        runs: The runs, from `qat_lightning.compare.find_runs`.
        metric: The metric, without the variant's name; by default the models' own, otherwise an accuracy.
        larger_is_better: Direction of the metric; by default as stated by the models, or guessed from its name.
        ignore: Globs of settings that do not count as a difference.

    Returns:
        The comparison.

    Raises:
        ConfigurationError: The metric is not clear, or no run has it.

    Example:
        >>> runs = [
        ...     Run(m, m, config={"mode": m, "seed": 0}, metrics={"int8/acc": a})
        ...     for m, a in (("fx", 1.0), ("pt2e", 0.5))
        ... ]
        >>> [(c.label, c.score.mean) for c in compare(runs).configurations]
        [('fx', 1.0), ('pt2e', 0.5)]
    """
    _check_any_finished(runs)
    runs = [with_bare_tests(replace(run, metrics=numbers(run.metrics))) for run in runs]
    finished = [run for run in runs if run.status == "finished"]
    chosen = choose_metric(finished, metric, larger_is_better)
    tested = [run for run in finished if _variant(run, chosen)]
    settings = differing(tested, ignore)
    float_runs = [run for run in tested if _is_float(run, chosen)]
    floats = _float_scores(float_runs, chosen, ignore)
    fastest = fastest_floats(tested, ignore)
    folded: dict[tuple[str, ...], list[Run]] = {}
    for row, run in enumerate(tested):
        folded.setdefault(tuple(setting.values[row] for setting in settings), []).append(run)
    found = [
        _configuration(same, settings, values, chosen, floats, float_runs, ignore) for values, same in folded.items()
    ]
    tasks = tasks_of([c.runs[0] for c in found], ignore)
    noises = [why_noisy(c.runs, c.latency_ms, c.speedup, fastest, ignore) for c in found]
    found = [replace(c, noise=noise, task=task) for c, noise, task in zip(found, noises, tasks, strict=True)]
    variants = {id(run): c.variant for c, same in zip(found, folded.values(), strict=True) for run in same}
    compared = {id(run) for c in found for run in c.runs}
    sign = -1 if chosen.larger_is_better else 1
    in_order = [*dict.fromkeys(tasks)]
    found.sort(key=lambda configuration: (in_order.index(configuration.task), sign * configuration.score.mean))
    front = _front(found, chosen)
    return Comparison(
        chosen,
        tuple(settings),
        tuple(replace(c, on_front=on, label=label) for c, on, label in zip(found, front, _labels(found), strict=True)),
        tuple(_why_left_out(run, chosen, variants.get(id(run))) for run in runs if id(run) not in compared),
    )


def _check_any_finished(runs: Sequence[Run]) -> None:
    if any(run.status == "finished" for run in runs):
        return
    said = "".join(f"\n- {' '.join(run.overrides) or run.name} ({run.status}): {run.reason}" for run in runs[:10])
    raise ConfigurationError(f"None of {len(runs)} runs finished, so there is nothing to compare.{said}")


def _variant(run: Run, metric: Metric) -> str | None:
    """Return the variant of a run to compare: the one that would be deployed."""
    return next((variant for variant in reversed(VARIANTS) if f"{variant}/{metric.name}" in run.metrics), None)


def _why_left_out(run: Run, metric: Metric, variant: str | None) -> Run:
    """Return a run with the reason why it is not compared, given the variant of its configuration if it has one."""
    if run.status != "finished":
        return run
    if variant is None:
        return replace(run, reason=f"it has no {metric.name} of a variant")
    others = "which other runs with its settings have"
    return replace(run, reason=f"its {metric.name} of {variant}, {others}, is missing or not a finite number")


LATENCY, SIZE = 0.02, 0.01
"""Relative tolerances of latency and size: timings vary, and file sizes depend on names in the file."""


def score_tolerance(metric: Metric) -> float:
    """Return the tolerance of a score: 0.05 percentage points of a share, otherwise 0."""
    return 0.0005 if metric.is_share else 0.0


def _front(configurations: Sequence[Configuration], metric: Metric) -> list[bool]:
    """Return the Pareto front of score, latency and size; without latency if latencies are unreliable."""
    noisy = any(configuration.noise for configuration in configurations)
    points = [_goals(configuration, metric, noisy) for configuration in configurations]
    tolerances = (score_tolerance(metric), *(() if noisy else (math.log1p(LATENCY),)), math.log1p(SIZE))
    return front_of_each_task(configurations, points, tolerances)


def front_of_each_task(
    configurations: Sequence[Configuration],
    points: Sequence[tuple[float, ...] | None],
    tolerances: Sequence[float] = (),
) -> list[bool]:
    """Return whether each configuration is on the `pareto_front` of its task, given their points."""
    places: dict[Task, list[int]] = {}
    for place, configuration in enumerate(configurations):
        places.setdefault(configuration.task, []).append(place)
    fronts: dict[int, bool] = {}
    for same in places.values():
        fronts |= zip(same, pareto_front([points[place] for place in same], tolerances), strict=True)
    return [fronts[place] for place in range(len(configurations))]


def _goals(configuration: Configuration, metric: Metric, noisy: bool) -> tuple[float, ...] | None:
    """Return coordinates on which larger is better; costs are negative logarithms, so differences are ratios."""
    costs = [configuration.size_mb] if noisy else [configuration.latency_ms, configuration.size_mb]
    if any(cost is None or cost.mean <= 0 for cost in costs):
        return None
    score = configuration.score.mean if metric.larger_is_better else -configuration.score.mean
    return score, *(-math.log(cost.mean) for cost in costs if cost is not None)


def _configuration(
    same: Sequence[Run],
    settings: Sequence[Setting],
    values: Sequence[str],
    metric: Metric,
    floats: Mapping[tuple[str, str], float],
    float_runs: Sequence[Run],
    ignore: Sequence[str],
) -> Configuration:
    # Conversion on or off is a setting, so a run without the variant of the others did not get as far as they did.
    variant = max((_variant(run, metric) or "float" for run in same), key=VARIANTS.index)
    runs = tuple(run for run in same if f"{variant}/{metric.name}" in run.metrics)

    def over_seeds(value: Callable[[Run], float | None]) -> Spread | None:
        return spread((seed_of(run), number) for run in runs if (number := value(run)) is not None)

    score = over_seeds(lambda run: run.metrics.get(f"{variant}/{metric.name}"))
    assert score is not None, "only runs with the metric are grouped"
    drop, baseline = _drop(runs, variant, metric, floats, ignore)
    return Configuration(
        label="",
        values={setting.label: value for setting, value in zip(settings, values, strict=True)},
        runs=runs,
        variant=variant,
        score=score,
        drop=drop,
        latency_ms=over_seeds(lambda run: run.metrics.get(f"{variant}/latency_ms")),
        size_mb=over_seeds(lambda run: run.metrics.get(f"{variant}/size_mb")),
        speedup=over_seeds(lambda run: run.metrics.get("speedup") if variant == "int8" else None),
        agreement=over_seeds(lambda run: run.metrics.get("int8/agreement")),
        baseline=baseline,
        unpaired="" if variant == "float" or baseline == "float runs" else why_unpaired(runs[0], float_runs, ignore),
    )


def why_unpaired(run: Run, float_runs: Sequence[Run], ignore: Sequence[str] = ()) -> str:
    """Return in which settings the float run that is most like a run differs from it, and what to do.

    Args:
        run: A run without a float run as its baseline.
        float_runs: The float runs; the result is empty if there are none.
        ignore: Globs of settings that do not count.

    Example:
        >>> float_run = Run("f", "f", config={"lr": 0.1, "width": 8})
        >>> why_unpaired(Run("q", "q", config={"lr": 0.01, "width": 8}), [float_run])
        "no float run has the same training: f has another lr; with --ignore 'lr' they are compared"
    """
    own = training_settings(run, ignore)
    found = []
    for other in float_runs:
        theirs = training_settings(other, ignore)
        found.append((other, [key for key in {**own, **theirs} if own.get(key) != theirs.get(key)]))
    if not found:
        return ""
    nearest, keys = min(found, key=lambda pair: len(pair[1]))
    if not keys:
        return f"no float run has the seed {seed_of(run)}"
    name = " ".join(nearest.overrides) or nearest.name
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    said = f"no float run has the same training: {name} has another {', '.join(keys[:_NAMED])}{more}"
    if more or any(key.partition(".")[0] in _DATA_AND_NETWORK for key in keys):
        return said
    return f"{said}; with {' '.join(f'--ignore {key!r}' for key in keys)} they are compared"


_NAMED = 5
"""How many differing settings are named."""
# Sections without which a float run would be that of another network or of other data
_DATA_AND_NETWORK = ("data", "dataset", "datamodule", "model", "net", "network", "module")


def _drop(
    runs: Sequence[Run], variant: str, metric: Metric, floats: Mapping[tuple[str, str], float], ignore: Sequence[str]
) -> tuple[Spread | None, str]:
    """Return the drop relative to float, paired by seed, and which float that is."""
    if variant == "float":
        return None, ""
    scores = _by_seed(runs, f"{variant}/{metric.name}")
    keys = {seed_of(run): (training_of(run, ignore), seed_of(run)) for run in runs}
    trained = {seed: floats[key] for seed, key in keys.items() if key in floats}
    own = _by_seed(runs, f"float/{metric.name}")
    baselines, name = (trained, "float runs") if trained else (own, _own_float(runs))
    # Paired differences vary less than differences of means, because effects of the seed cancel.
    drop = spread((seed, metric.loss(score, baselines[seed])) for seed, score in scores.items() if seed in baselines)
    return drop, name if drop else ""


def _own_float(runs: Sequence[Run]) -> str:
    key = "float_checkpoint"
    for run in runs:
        flat = under_one_name(flatten(run.config))
        if any(flat.get(name, "null") != "null" for name in (key, f"{NAME}.{key}")):
            return key
    return "float of the same run"


def _by_seed(runs: Sequence[Run], key: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in runs:
        if key in run.metrics:
            values.setdefault(seed_of(run), []).append(run.metrics[key])
    return {seed: statistics.fmean(same) for seed, same in values.items()}


def _float_scores(runs: Sequence[Run], metric: Metric, ignore: Sequence[str]) -> dict[tuple[str, str], float]:
    """Return the score of each float run, by its training settings and seed."""
    floats: dict[str, list[Run]] = {}
    for run in runs:
        floats.setdefault(training_of(run, ignore), []).append(run)
    return {
        (training, seed): score
        for training, same in floats.items()
        for seed, score in _by_seed(same, f"float/{metric.name}").items()
    }


def _is_float(run: Run, metric: Metric) -> bool:
    """Whether a run can be a baseline.

    A run that only continues a float run cannot, nor can one with a quantizing callback of which int8 has no score.
    """
    flat = flatten(run.config)
    is_none = quantizes(flat) or flat.get("method.continues") == "true"
    return _variant(run, metric) == "float" and bool(run.config) and not is_none


def _labels(configurations: Sequence[Configuration]) -> list[str]:
    """Return a label for each: the values that differ, with the setting's name where the value alone is unclear."""
    labels = []
    for configuration in configurations:
        words = [
            value if value.replace("_", "").isalnum() and not _is_number(value) else f"{label}={value}"
            for label, value in configuration.values.items()
            if value != ABSENT
        ]
        labels.append(" ".join(words) or _without_words(configuration))
    return labels


def _without_words(configuration: Configuration) -> str:
    """Return a label for a configuration without any of the settings that differ: its method, or its logged name."""
    run = configuration.runs[0]
    return "float" if configuration.is_float else " ".join(run.overrides) or run.name


def _is_number(text: str) -> bool:
    return text in ("true", "false", "null") or text.replace(".", "", 1).lstrip("-").replace("e-", "").isdigit()
