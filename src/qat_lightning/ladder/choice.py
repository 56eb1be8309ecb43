"""What was measured, which of it is nearest to the target, and what to try next: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qat_lightning.ladder.judgement import Drop
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.rungs import OTHER_MODE, RUNGS, STATIC, Known, Need, Rung, in_order
from qat_lightning.ladder.sources import ErrorSources
from qat_lightning.ladder.target import LIMITS, Limit, Target
from qat_lightning.ladder.timing import is_noisy


@dataclass(frozen=True)
class Attempt:
    """What came of one rung.

    Attributes:
        rung: Its name.
        plan: What it tried.
        drop: Against float, on the validation data; None where there is no network.
        speedup: Times faster than float.
        size_mb: Of what is shipped.
        metrics: All that was measured, under the keys of the loggers.
        minutes: That it took.
        cut_short: Whether its training was ended by the clock.
        started: Whether it was tried at all.
        error: Why there is no network, or why it was not tried; empty if there is one.
    """

    rung: str
    plan: Plan
    drop: Drop | None = None
    speedup: float | None = None
    size_mb: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    minutes: float = 0.0
    cut_short: bool = False
    started: bool = True
    error: str = ""

    def missed(self, target: Target) -> dict[Limit, float]:
        """By which share it misses each limit."""
        drop = None if self.drop is None else self.drop.judged(confident=target.confident)
        return target.missed(drop, self.speedup, self.size_mb)

    def verdict(self, target: Target) -> str:
        """What came of it, in few words."""
        if self.error:
            return self.error
        missed = self.missed(target)
        words = "keeps the target" if not missed else f"misses {' and '.join(missed)}"
        open_ = "drop" in missed or not missed
        doubt = self.drop is not None and self.drop.undecided(target.max_drop) and open_
        said = [
            words,
            *(["the drop is undecided"] if doubt else []),
            *(
                ["the speed-up is uncertain on this busy machine"]
                if target.min_speedup and is_noisy(self.metrics)
                else []
            ),
            *(["its training was cut short"] if self.cut_short else []),
        ]
        return ", ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = dict(vars(self))
        return plain | {"plan": self.plan.to_dict(), "drop": self.drop and self.drop.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Attempt:
        """Undo `to_dict`."""
        drop = values["drop"]
        plan = Plan.from_dict(values["plan"])
        return cls(**{**values, "plan": plan, "drop": None if drop is None else Drop.from_dict(drop)})


@dataclass(frozen=True)
class Step:
    """What to try next.

    Attributes:
        rung: The rung.
        plan: What it tries; where something is to be measured first, the plan to measure the layers of.
        first: What is to be measured of the layers first; empty for nothing.
    """

    rung: Rung
    plan: Plan
    first: Need = ""


def nearest(attempts: Sequence[Attempt], target: Target) -> Attempt | None:
    """The attempt that misses the fewest limits, and of those by the least; the first of equals.

    Returns:
        None where there is no network at all.
    """

    def far(attempt: Attempt) -> tuple[float, ...]:
        missed = attempt.missed(target)
        return len(missed), sum(missed.values())

    return min((a for a in attempts if not a.error), key=far, default=None)


def to_go_on_from(attempts: Sequence[Attempt], target: Target) -> Attempt | None:
    """The attempt whose plan the next rung changes: limits are settled one after the other, in the order of `LIMITS`.

    Where several keep the size, the speed decides, and then the drop; a share of `_ALIKE` of a limit decides nothing
    of size and speed, which are not measured better than that.

    Returns:
        None where there is no network at all.
    """

    def far(attempt: Attempt) -> tuple[float, ...]:
        missed = attempt.missed(target)
        size, speed, drop = (missed.get(limit, 0.0) for limit in LIMITS)
        return _rough(size), _rough(speed), drop

    return min((a for a in attempts if not a.error), key=far, default=None)


_ALIKE = 0.05


def _rough(share: float) -> float:
    return math.ceil(share / _ALIKE) if math.isfinite(share) else share


def next_step(
    attempts: Sequence[Attempt], start: Plan, target: Target, known: Known, rungs: Sequence[Rung] = RUNGS
) -> Step | None:
    """What to try next: a function of what was measured, so that a ladder that was broken off goes on as it was.

    The first rung quantizes with static ranges. From then on the limits that the best attempt misses say which rungs
    are next, those of size and speed before those of accuracy, because they are cheap and accuracy has to be won back
    for what is shipped. Before the first rung for accuracy it is measured whether the error comes from weights or from
    activations (`ErrorSources`), and rungs for the larger part go first. A rung is tried once, and changes the plan of
    that attempt (`to_go_on_from`).

    Args:
        attempts: What was tried, in its order; what could not be made among it.
        start: The plan of the first rung.
        target: What has to be reached.
        known: What rungs may ask.
        rungs: Those that there are.

    Returns:
        The step; None where the target is reached, or nothing is left to try.

    Example:
        >>> step = next_step([], Plan(), Target(max_drop=0.01), Known())
        >>> step.rung.name
        'static'
        >>> static = Attempt("static", Plan(), Drop(0.05, 0.04, 0.06, 9), 2.0, 1.0)
        >>> next_step([static], Plan(), Target(max_drop=0.01), Known()).first
        'sources'
        >>> of_weights = Known(sources=ErrorSources(weights_db=10.0, activations_db=30.0))
        >>> next_step([static], Plan(), Target(max_drop=0.01), of_weights).rung.name
        'bias_correction'
    """
    if not attempts:
        return Step(STATIC, start)
    best = to_go_on_from(attempts, target)
    tried = {attempt.rung for attempt in attempts}
    if best is None:
        plan = OTHER_MODE.change(start, known)
        return None if plan is None or OTHER_MODE.name in tried else Step(OTHER_MODE, plan)
    known = replace(known, distillation=known.distillation and not _teacher_failed(attempts))
    missed = best.missed(target)
    ordered = in_order(rungs, known.sources or ErrorSources())
    for rung in (rung for limit in LIMITS if limit in missed for rung in ordered if rung.limit == limit):
        if rung.name in tried:
            continue
        if rung.needs and getattr(known, rung.needs) is None:
            return Step(rung, best.plan, rung.needs)
        plan = rung.change(best.plan, known)
        if plan is None or plan in [attempt.plan for attempt in attempts]:
            continue
        if rung.side and known.sources is None:
            return Step(rung, best.plan, "sources")
        return Step(rung, plan)
    return None


def _teacher_failed(attempts: Sequence[Attempt]) -> bool:
    """Whether a training that was to learn from the float network could not be done."""
    return any(attempt.plan.distillation and attempt.started and attempt.error for attempt in attempts)
