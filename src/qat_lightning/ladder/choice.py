"""The attempts of a search, the one nearest to the target, and the next step: pure functions."""

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
    """The result of one rung.

    Attributes:
        rung: The name of the rung.
        plan: The plan that was tried.
        drop: The drop against float on the validation data; None without a network.
        speedup: Speed relative to float.
        size_mb: Size of the shipped files, in 10^6 bytes.
        metrics: All measurements, under the keys of the loggers.
        minutes: Its duration.
        cut_short: Whether its training ended before its last epoch, as at a time limit.
        started: Whether it was started.
        error: Why there is no network, or why it was not started; empty if there is a network.
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
        """The relative excess over each limit that it misses."""
        drop = None if self.drop is None else self.drop.judged(confident=target.confident)
        return target.missed(drop, self.speedup, self.size_mb)

    def verdict(self, target: Target) -> str:
        """The result in a few words."""
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
    """The next step.

    Attributes:
        rung: The rung.
        plan: The plan that it tries; if something must be measured first, the plan to measure it with.
        first: The field of `Known` to measure first; empty for none.
    """

    rung: Rung
    plan: Plan
    first: Need = ""


def nearest(attempts: Sequence[Attempt], target: Target) -> Attempt | None:
    """The attempt that misses the fewest limits, and among those by the least; the first of equals.

    Returns:
        The attempt; None if no attempt has a network.
    """

    def far(attempt: Attempt) -> tuple[float, ...]:
        missed = attempt.missed(target)
        return len(missed), sum(missed.values())

    return min((a for a in attempts if not a.error), key=far, default=None)


def to_go_on_from(attempts: Sequence[Attempt], target: Target) -> Attempt | None:
    """The attempt whose plan the next rung changes; limits are settled one after another, in the order of `LIMITS`.

    If several attempts keep the size, the speed decides, and then the drop. Differences in size and speed below
    `_ALIKE` of the limit are within the measurement error and are ignored.

    Returns:
        The attempt; None if no attempt has a network.
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
    """The next step: a function of the measurements alone, so that an interrupted search continues in the same way.

    The first rung quantizes with static ranges. After it, the limits that the best attempt misses determine the next
    rungs: size and speed before accuracy, because they are cheap to reach, and because accuracy must be recovered for
    the network that is shipped. Before the first rung for accuracy, the source of the error is measured
    (`ErrorSources`), and the rungs for the larger part come first. Each rung is tried once, and changes the plan of the
    attempt to continue from (`to_go_on_from`).

    Args:
        attempts: The attempts so far, in order, including failed ones.
        start: The plan of the first rung.
        target: The target.
        known: What rungs may ask besides the plan.
        rungs: The rungs of the search.

    Returns:
        The step; None if the target is reached or no rung is left.

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
    """Whether a training with distillation failed."""
    return any(attempt.plan.distillation and attempt.started and attempt.error for attempt in attempts)
