"""One candidate for each layer, chosen exactly: a pure function of numbers that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qat_lightning.errors import MissingExtraError

_TRIES = 20
"""How often a limit is drawn in by what the solver's tolerance let through."""


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
    """`choose` without a second goal; a choice is checked without the solver's tolerance."""
    names: tuple[Goal, ...] = ("loss", "size", "time")
    kept = [name for name in names if math.isfinite(getattr(limits, name))]
    drawn_in = dict.fromkeys(kept, 0.0)
    for _ in range(_TRIES):
        found = _milp(costs, {name: getattr(limits, name) - drawn_in[name] for name in kept}, goal)
        if found is None:
            return None
        over = {name: total(costs, found, name) - getattr(limits, name) for name in kept}
        past = {name: excess for name, excess in over.items() if excess > 0}
        if not past:
            return found
        for name, excess in past.items():
            drawn_in[name] = max(2 * drawn_in[name], 2 * excess)
    return None


def _milp(costs: Sequence[Sequence[Cost]], at_most: dict[Goal, float], goal: Goal) -> tuple[int, ...] | None:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise MissingExtraError("Choosing bits needs scipy: pip install 'qat-lightning[sensitivity]'.") from error
    counts = [len(row) for row in costs]
    one_each = np.zeros((len(costs), sum(counts)))
    for layer, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        one_each[layer, end - count : end] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, most in at_most.items():
        values = _column(costs, name)
        scale = float(np.abs(values).max()) or 1.0
        constraints.append(LinearConstraint(values[None] / scale, -np.inf, most / scale))
    objective = _column(costs, goal)
    result = milp(
        objective / (float(np.abs(objective).max()) or 1.0),
        integrality=np.ones(sum(counts)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    ends = np.cumsum(counts)
    return tuple(int(np.argmax(result.x[end - count : end])) for count, end in zip(counts, ends, strict=True))


def _column(costs: Sequence[Sequence[Cost]], name: Goal) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([getattr(cost, name) for row in costs for cost in row], dtype=np.float64)
