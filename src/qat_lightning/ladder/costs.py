"""The expected duration of a plan, from measurements of the same search: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from qat_lightning.ladder.choice import Attempt
from qat_lightning.ladder.plan import Plan

Part = Literal["sequential_mse", "adaround_blocks", "adaround", "epoch"]
"""The parts of a plan that take longer than a calibration; ``"epoch"`` is one epoch of quantization-aware training."""

PARTS: tuple[Part, ...] = get_args(Part)


def parts_of(plan: Plan) -> frozenset[Part]:
    """The parts of a plan that take longer than a calibration.

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
    """The parts of a plan whose cost no attempt shows and that must be measured; see `expected_minutes`."""
    like = _most_alike(plan, attempts)
    return parts_of(plan) - (frozenset() if like is None else parts_of(like.plan))


def expected_minutes(plan: Plan, attempts: Sequence[Attempt], costs: Mapping[Part, float]) -> float:
    """The expected duration of a plan.

    The attempt with most of its parts, and no others, shows how long these take together with calibration and
    evaluation; of several the last, because the first rung of a search also pays for what is loaded once. The epochs of
    a training are scaled, and the other parts are added.

    Args:
        plan: The plan to try.
        attempts: The attempts so far.
        costs: Minutes of each of the `unknown_parts`.

    Returns:
        Minutes; 0 if nothing is known.

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
    """The attempt with most of the plan's parts and no others; the last of several."""
    wanted = parts_of(plan)
    some = [attempt for attempt in reversed(_finished(attempts)) if parts_of(attempt.plan) <= wanted]
    return max(some, key=lambda attempt: len(parts_of(attempt.plan)), default=None)


def _finished(attempts: Sequence[Attempt]) -> list[Attempt]:
    return [attempt for attempt in attempts if not attempt.error and not attempt.cut_short]
