"""Choosing the configuration to deploy: the best one within limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from qat_lightning.compare.comparison import LATENCY, SIZE, Comparison, Configuration, score_tolerance
from qat_lightning.compare.spread import Spread
from qat_lightning.errors import ConfigurationError

Goal = Literal["score", "latency", "size"]


@dataclass(frozen=True)
class Limits:
    """Limits for the mean over seeds.

    Args:
        max_drop: Largest drop relative to float: percentage points for scores between 0 and 1, otherwise in the
            metric's unit.
        max_latency: Largest latency in milliseconds.
        max_size: Largest size in MB.
        prefer: What decides within the limits: ``score``, ``latency`` or ``size``. By default the
            latency if the drop is limited, else the score.

    Raises:
        ConfigurationError: A limit is not a number, or a latency or size is not above zero.

    Example:
        >>> Limits(max_drop=0.5).goal, Limits(max_latency=5).goal
        ('latency', 'score')
    """

    max_drop: float | None = None
    max_latency: float | None = None
    max_size: float | None = None
    prefer: Goal | None = None

    def __post_init__(self) -> None:
        for name, limit, least in (
            ("max_drop", self.max_drop, -math.inf),
            ("max_latency", self.max_latency, 0.0),
            ("max_size", self.max_size, 0.0),
        ):
            is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if limit is not None and not (is_number and least < limit < math.inf):
                above = "a number" if least < 0 else "a number above 0"
                raise ConfigurationError(f"{name}={limit!r} is not a limit: use {above}.")
        if self.prefer is not None and self.prefer not in get_args(Goal):
            raise ConfigurationError(f"prefer={self.prefer!r} is unknown: use one of {', '.join(get_args(Goal))}.")

    @property
    def given(self) -> bool:
        """Whether any limit was given."""
        return any(value is not None for value in (self.max_drop, self.max_latency, self.max_size, self.prefer))

    @property
    def goal(self) -> Goal:
        """What decides among the configurations within the limits."""
        return self.prefer or ("latency" if self.max_drop is not None else "score")


@dataclass(frozen=True)
class Decision:
    """The configuration to deploy, and the reason.

    Args:
        winner: The choice; None if nothing qualifies or no limit was given.
        runner_up: The next best.
        reason: One or two sentences.
    """

    winner: Configuration | None
    runner_up: Configuration | None
    reason: str


def decide(comparison: Comparison, limits: Limits) -> Decision:
    """Choose the best int8 network within the limits.

    Float runs are not candidates: they are the reference, and if one beats the choice, the reason says so. A
    configuration without a limited figure does not qualify. Latencies that were disturbed by other work are ignored.
    Ties go to the better score, then to the lower latency, then to the smaller size. Among several tasks nothing is
    chosen.

    Args:
        comparison: The configurations.
        limits: The limits, and what decides within them.

    Returns:
        The choice with its reason. If nothing qualifies, the reason names the closest configuration and the
        limit it misses.
    """
    if len(comparison.tasks) > 1:
        return Decision(None, None, _of_several_tasks(comparison))
    if not limits.given:
        front, total = len(comparison.front), len(comparison.configurations)
        asked = f"{front} of {_count(total)} {'is' if front == 1 else 'are'} on the Pareto front"
        if not front:
            asked = "there is no Pareto front, because no configuration has both a latency and a size"
        return Decision(None, None, f"No run is chosen, because no limit was given: {asked}.")
    shippable = [c for c in comparison.configurations if c.variant == "int8"]
    if not shippable:
        return Decision(None, None, "Nothing can be shipped: there is no int8 network with the metric.")
    judged = [(configuration, _missed(configuration, comparison, limits)) for configuration in shippable]
    kept = [configuration for configuration, missed in judged if not missed]
    if not kept:
        closest, missed = min(judged, key=lambda pair: (len(pair[1]), sum(excess for _, excess in pair[1])))
        said = " and ".join(text for text, _ in missed)
        none = f"None of {_count(len(shippable), 'int8 ')} keeps {_asked(comparison, limits)}."
        return Decision(None, None, f"{none} Closest is {closest.label}, whose {said}.")
    goal, why = limits.goal, _why_not(limits.goal, kept, comparison)
    if why and limits.prefer == goal:
        return Decision(None, None, f"No run is chosen by {goal}: {why}")
    note = f" {goal.capitalize()} is ignored: {why}" if why else _unknown(goal, kept)
    goal = "score" if why else goal
    ranked = sorted(kept, key=lambda c: _rank(c, comparison, goal))
    winner, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    best = f"{winner.label} {_among(goal, len(ranked), len(shippable), comparison, limits)}"
    reason = f"{best}: {_figure(winner, comparison, goal)}." + _against(winner, runner_up, comparison, goal)
    reason += note + _of_fewer_seeds(winner, limits, goal)
    return Decision(winner, runner_up, reason + _float_is_better(winner, comparison, goal))


def _of_several_tasks(comparison: Comparison) -> str:
    tasks = comparison.tasks
    one = next(task for task in tasks if task.settings)
    return (
        f"No run is chosen, because the runs are of {len(tasks)} tasks ({', '.join(map(str, tasks))}), and scores "
        f"compare only within a task: {one.options} compares one of them."
    )


def _why_not(goal: Goal, candidates: Sequence[Configuration], comparison: Comparison) -> str:
    """Return why a goal cannot decide among candidates, and what to do; empty if it can."""
    if goal == "latency" and comparison.noisy:
        return _noise(comparison)
    if any(_of(candidate, goal) is not None for candidate in candidates):
        return ""
    which = "the candidate" if len(candidates) == 1 else f"any of the {len(candidates)} candidates"
    return f"it is not known of {which}. {_MEASURED_BY[goal]}"


_MEASURED_BY = {
    "latency": "--remeasure times saved int8 files (qat.save('<the run's folder>/model.int8')), and "
    "evaluate_variants(trainer, model) logs it.",
    "size": "evaluate_variants(trainer, model) logs it.",
    "score": "",
}


def _unknown(goal: Goal, candidates: Sequence[Configuration]) -> str:
    """Say which candidates do not have the figure that decides."""
    unknown = [candidate.label for candidate in candidates if _of(candidate, goal) is None]
    return f" The {goal} of {', '.join(unknown)} is not known." if unknown else ""


def _noise(comparison: Comparison) -> str:
    """Return why latencies are unreliable, and what to do."""
    noisy = next(c for c in comparison.configurations if c.noise)
    return (
        f"some were measured while other work was running ({noisy.label}: {noisy.noise}). Use --remeasure on an idle "
        "machine: it times the int8 files and float again, alternately."
    )


def _among(goal: Goal, kept: int, total: int, comparison: Comparison, limits: Limits) -> str:
    """Describe the winner's rank among the candidates."""
    asked = _asked(comparison, limits)
    if not asked:
        return f"has the {_BEST[goal]} of {_count(total, 'int8 ')}"
    if total == 1:
        return f"has the {_BEST[goal]} as the only int8 configuration, and keeps {asked}"
    if kept == 1:
        return f"is the only one of {_count(total, 'int8 ')} that keeps {asked}, and so has the {_BEST[goal]}"
    if kept < total:
        return f"has the {_BEST[goal]} of the {kept} (of {_count(total, 'int8 ')}) that keep {asked}"
    return f"has the {_BEST[goal]} of the {_count(kept, 'int8 ')}, which all keep {asked}"


def _of_fewer_seeds(winner: Configuration, limits: Limits, goal: Goal) -> str:
    """Say which figures that decided are not those of all seeds."""
    seeds = winner.score.seeds
    figures = (
        ("drop", winner.drop, limits.max_drop is not None),
        ("latency", winner.latency_ms, limits.max_latency is not None or goal == "latency"),
        ("size", winner.size_mb, limits.max_size is not None or goal == "size"),
    )
    return "".join(
        f" Its {name} is that of {figure.seeds} of {seeds} seeds."
        for name, figure, decided in figures
        if decided and figure is not None and figure.seeds < seeds
    )


def _float_is_better(winner: Configuration, comparison: Comparison, goal: Goal) -> str:
    """Say if a float run, which is not a candidate, is better in the goal than the choice or every int8 network."""
    floats = [c for c in comparison.configurations if c.is_float and _of(c, goal) is not None]
    if not floats:
        return ""
    best = min(floats, key=lambda c: _rank(c, comparison, goal))
    int8 = [c for c in comparison.configurations if c.variant == "int8" and _of(c, goal) is not None]
    beaten = [c for c in int8 if _beats(best, c, comparison, goal)]
    if winner not in beaten:
        return ""
    whom = "every int8 network" if len(beaten) == len(int8) else "the choice"
    return f" Float beats {whom} in {_IN[goal]}: {_figure(best, comparison, goal)}."


def _beats(one: Configuration, other: Configuration, comparison: Comparison, goal: Goal) -> bool:
    """Whether a configuration is better than another in the goal, by more than the tolerance."""
    ours, theirs = _of(one, goal), _of(other, goal)
    assert ours is not None
    assert theirs is not None
    larger = goal == "score" and comparison.metric.larger_is_better
    by = (ours.mean - theirs.mean) * (1 if larger else -1)
    return not _at_most(by, _tolerance(goal, ours.mean, comparison))


def _at_most(value: float, limit: float) -> bool:
    """Whether a value keeps a limit; the error of floating-point arithmetic does not count."""
    return value <= limit or math.isclose(value, limit, rel_tol=1e-6, abs_tol=1e-9)


def _tolerance(goal: Goal, value: float, comparison: Comparison) -> float:
    return {"score": score_tolerance(comparison.metric), "latency": LATENCY * value, "size": SIZE * value}[goal]


_IN = {"score": "score", "latency": "latency, so there is nothing to gain in speed", "size": "size"}
_BEST = {"score": "best score", "latency": "lowest latency", "size": "smallest size"}
_WORSE_THAN_ANY = math.inf


def _count(number: int, which: str = "") -> str:
    return f"{number} {which}configuration{'' if number == 1 else 's'}"


def _of(configuration: Configuration, goal: Goal) -> Spread | None:
    return {"score": configuration.score, "latency": configuration.latency_ms, "size": configuration.size_mb}[goal]


def _figure(configuration: Configuration, comparison: Comparison, goal: Goal) -> str:
    figure = _of(configuration, goal)
    if figure is None:
        return "not measured"
    if goal == "score":
        return f"{comparison.metric.name} {comparison.metric.text(figure.mean)}"
    return f"{figure.mean:.3g} {'ms' if goal == 'latency' else 'MB'}"


def _rank(configuration: Configuration, comparison: Comparison, goal: Goal) -> tuple[float, ...]:
    """Sort key: the goal first, then score, latency and size; smaller is better."""

    def cost(axis: Goal) -> float:
        figure = _of(configuration, axis)
        if figure is None:
            return _WORSE_THAN_ANY
        return -figure.mean if axis == "score" and comparison.metric.larger_is_better else figure.mean

    axes = (axis for axis in get_args(Goal) if not (axis == "latency" and comparison.noisy))
    return tuple(cost(axis) for axis in (goal, *axes))


def _missed(configuration: Configuration, comparison: Comparison, limits: Limits) -> list[tuple[str, float]]:
    """Return each limit that is exceeded, in words, and by which ratio."""
    drop = configuration.drop and configuration.drop.mean
    latency, size = configuration.latency_ms, configuration.size_mb
    missed = []
    for name, value, limit, unit in (
        ("drop", drop, limits.max_drop, comparison.metric.drop_unit),
        ("latency", latency and latency.mean, limits.max_latency, "ms"),
        ("size", size and size.mean, limits.max_size, "MB"),
    ):
        busy = name == "latency" and configuration.noise
        if limit is None or (value is not None and _at_most(value, limit) and not busy):
            continue
        if busy:
            missed.append(
                (f"latency was measured while other work was running ({busy}): use --remeasure", _WORSE_THAN_ANY)
            )
        elif value is None:
            why = f" ({configuration.unpaired})" if name == "drop" and configuration.unpaired else ""
            missed.append((f"{name} is not known{why}", _WORSE_THAN_ANY))
        else:
            missed.append((f"{name} is {value:.3g} {unit}".rstrip(), (value - limit) / (abs(limit) or 1.0)))
    return missed


def _asked(comparison: Comparison, limits: Limits) -> str:
    said = []
    if limits.max_drop is not None:
        said.append(f"a drop of at most {limits.max_drop:g} {comparison.metric.drop_unit}".rstrip())
    if limits.max_latency is not None:
        said.append(f"a latency of at most {limits.max_latency:g} ms")
    if limits.max_size is not None:
        said.append(f"a size of at most {limits.max_size:g} MB")
    return " and ".join(said)


def _against(winner: Configuration, runner_up: Configuration | None, comparison: Comparison, goal: Goal) -> str:
    """Describe the runner-up, and whether the difference is within the spread over seeds."""
    if runner_up is None:
        return ""
    said = f" Runner-up: {runner_up.label}, {_figure(runner_up, comparison, goal)}"
    first, second = _of(winner, goal), _of(runner_up, goal)
    deviations = [figure.deviation for figure in (first, second) if figure and figure.deviation is not None]
    if first and second and deviations and _at_most(abs(first.mean - second.mean), max(deviations)):
        said += ", which is within the spread over seeds"
    return f"{said}."
