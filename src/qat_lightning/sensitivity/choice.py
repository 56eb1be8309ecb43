"""One candidate for each layer, chosen exactly: a pure function of numbers that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qat_lightning.errors import MissingExtraError

_TRIES = 20
"""How many choices that only the solver's tolerance let through are forbidden one by one."""
_TOLERANCE = 1e-5
"""By how much of its largest cost a limit is drawn in after that; the solver's own tolerance is 1e-6."""


@dataclass(frozen=True)
class Cost:
    """What a candidate costs in one layer.

    Attributes:
        loss: Of the metric, 0 or more.
        size: In bytes.
        time: In milliseconds; less than 0 for what is faster than what is compared with.
    """

    loss: float = 0.0
    size: float = 0.0
    time: float = 0.0


Goal = Literal["loss", "size", "time"]


@dataclass(frozen=True)
class Limits:
    """What the costs of all layers together may be at most; inf for no limit."""

    loss: float = math.inf
    size: float = math.inf
    time: float = math.inf


def total(costs: Sequence[Sequence[Cost]], chosen: Sequence[int], what: Goal) -> float:
    """The sum over all layers of one cost.

    Example:
        >>> total([[Cost(size=1), Cost(size=3)], [Cost(size=4)]], (1, 0), "size")
        7.0
    """
    return math.fsum(getattr(row[index], what) for row, index in zip(costs, chosen, strict=True))


def choose(costs: Sequence[Sequence[Cost]], limits: Limits, goal: Goal) -> tuple[int, ...] | None:
    """The candidate of each layer with which the sum of one cost is least and no other sum is past its limit.

    A multiple-choice knapsack problem, solved exactly as a mixed-integer linear program, as HAWQ-V3 chooses bits
    (Yao et al., 2021, https://arxiv.org/abs/2011.10680). Of choices with the same sum, one with the least of the other
    costs is taken: the smallest of those that lose the same, and the one that loses least of those of the same size.

    Args:
        costs: For each layer what each of its candidates costs.
        limits: For the sums.
        goal: Which sum is to be least.

    Returns:
        The number of the candidate for each layer; None where no choice keeps the limits.

    Raises:
        MissingExtraError: scipy is not installed.

    Example:
        >>> costs = [[Cost(0.5, size=4), Cost(0.1, size=8)], [Cost(0.2, size=4), Cost(0.1, size=8)]]
        >>> choose(costs, Limits(size=12), "loss")
        (1, 0)
        >>> choose(costs, Limits(size=7), "loss") is None
        True
    """
    if not costs:
        return ()
    best = _solve(costs, limits, goal)
    if best is None:
        return None
    held = _held(limits, goal, total(costs, best, goal))
    return _solve(costs, held, "size" if goal == "loss" else "loss") or best


def _held(limits: Limits, goal: Goal, reached: float) -> Limits:
    now = {name: getattr(limits, name) for name in ("loss", "size", "time")}
    return Limits(**{**now, goal: min(now[goal], reached)})


def _solve(costs: Sequence[Sequence[Cost]], limits: Limits, goal: Goal) -> tuple[int, ...] | None:
    """`choose` without a second goal; a choice is checked without the solver's tolerance.

    One that is past a limit by less than that is forbidden, and the solver asked again. Where there are many such, all
    that come as near to the limit are given up.
    """
    names: tuple[Goal, ...] = ("loss", "size", "time")
    at_most = {name: getattr(limits, name) for name in names if math.isfinite(getattr(limits, name))}
    forbidden: list[tuple[int, ...]] = []
    for _ in range(_TRIES):
        found = _milp(costs, at_most, goal, forbidden)
        if found is None or all(total(costs, found, name) <= most for name, most in at_most.items()):
            return found
        forbidden.append(found)
    return _milp(costs, {name: most - _TOLERANCE * _scale(costs, name) for name, most in at_most.items()}, goal, [])


def _milp(
    costs: Sequence[Sequence[Cost]], at_most: dict[Goal, float], goal: Goal, forbidden: Sequence[tuple[int, ...]]
) -> tuple[int, ...] | None:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise MissingExtraError("Choosing bits needs scipy: pip install 'qat-lightning[sensitivity]'.") from error
    counts = [len(row) for row in costs]
    ends = np.cumsum(counts)
    one_each = np.zeros((len(costs), sum(counts)))
    for layer, (count, end) in enumerate(zip(counts, ends, strict=True)):
        one_each[layer, end - count : end] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, most in at_most.items():
        scale = _scale(costs, name)
        constraints.append(LinearConstraint(_column(costs, name)[None] / scale, -np.inf, most / scale))
    for choice in forbidden:
        chosen = np.zeros((1, sum(counts)))
        chosen[0, ends - counts + np.array(choice)] = 1
        constraints.append(LinearConstraint(chosen, -np.inf, len(costs) - 1))
    result = milp(
        _column(costs, goal) / _scale(costs, goal),
        integrality=np.ones(sum(counts)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    return tuple(int(np.argmax(result.x[end - count : end])) for count, end in zip(counts, ends, strict=True))


def _scale(costs: Sequence[Sequence[Cost]], name: Goal) -> float:
    return float(np.abs(_column(costs, name)).max()) or 1.0


def _column(costs: Sequence[Sequence[Cost]], name: Goal) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([getattr(cost, name) for row in costs for cost in row], dtype=np.float64)
