"""How long a plan will take, from what was measured in the same search: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from qat_lightning.ladder.choice import Attempt
from qat_lightning.ladder.plan import Plan

Part = Literal["sequential_mse", "adaround_blocks", "adaround", "epoch"]
"""What takes longer than a calibration; an epoch is one of quantization-aware training."""

PARTS: tuple[Part, ...] = get_args(Part)


def parts_of(plan: Plan) -> frozenset[Part]:
    """What of a plan takes longer than a calibration.

    Example:
        >>> sorted(parts_of(Plan(sequential_mse=True, adaround=500)))
        ['adaround', 'sequential_mse']
    """
    adaround: Part = "adaround_blocks" if plan.adaround_blocks else "adaround"
    there: dict[Part, bool] = {
        "sequential_mse": plan.sequential_mse,
        adaround: bool(plan.adaround),
        "epoch": bool(plan.epochs),
    }
    return frozenset(part for part, present in there.items() if present)


def unknown_parts(plan: Plan, attempts: Sequence[Attempt]) -> frozenset[Part]:
    """The parts of a plan whose cost no attempt tells, so that it has to be measured; see `expected_minutes`."""
    like = _most_alike(plan, attempts)
    return parts_of(plan) - (frozenset() if like is None else parts_of(like.plan))


def expected_minutes(plan: Plan, attempts: Sequence[Attempt], costs: Mapping[Part, float]) -> float:
    """How long a plan will take, about.

    The attempt that has most of its parts, and no others, says how long these take together with calibrating and
    judging; of several such the last, because the first one of a search also pays for what is loaded once. The epochs
    of a training are scaled, and the other parts are added.

    Args:
        plan: What is to be tried.
        attempts: What was.
        costs: Minutes of each of the `unknown_parts`.

    Returns:
        0 where nothing is known.

    Example:
        >>> static = Attempt("static", Plan(), minutes=0.5)
        >>> expected_minutes(Plan(adaround=500), [static], {"adaround": 3.0})
        3.5
        >>> short = Attempt("qat_short", Plan(epochs=2), minutes=4.5)
        >>> expected_minutes(Plan(epochs=8), [static, short], {})
        16.5
    """
    like = _most_alike(plan, attempts)
    known = 0.0
    if like is not None:
        calibrated = next((a.minutes for a in reversed(_finished(attempts)) if not parts_of(a.plan)), 0.0)
        longer = max(0.0, like.minutes - calibrated)
        known = like.minutes - longer + longer * (plan.epochs / like.plan.epochs if like.plan.epochs else 1)
    return known + sum(costs[part] * (plan.epochs or 1) for part in unknown_parts(plan, attempts))


def _most_alike(plan: Plan, attempts: Sequence[Attempt]) -> Attempt | None:
    """Of the attempts without other parts, the one with the most; of several such the last."""
    wanted = parts_of(plan)
    some = [attempt for attempt in reversed(_finished(attempts)) if parts_of(attempt.plan) <= wanted]
    return max(some, key=lambda attempt: len(parts_of(attempt.plan)), default=None)


def _finished(attempts: Sequence[Attempt]) -> list[Attempt]:
    return [attempt for attempt in attempts if not attempt.error and not attempt.cut_short]
