"""Choosing one candidate per layer exactly, from measured costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qat_lightning.errors import MissingExtraError

_TRIES = 20
"""Largest number of choices to exclude one by one that exceed a limit by less than the solver's tolerance."""
_TOLERANCE = 1e-5
"""After that, by how much to tighten a limit, relative to its largest cost; the solver's tolerance is 1e-6."""


@dataclass(frozen=True)
class Cost:
    """Cost of a candidate in one layer.

    Attributes:
        loss: Loss of the metric; at least 0.
        size: In bytes.
        time: In milliseconds, relative to the reference; may be negative.
    """

    loss: float = 0.0
    size: float = 0.0
    time: float = 0.0


Goal = Literal["loss", "size", "time"]


@dataclass(frozen=True)
class Limits:
    """Upper bounds for the sums of costs over all layers; inf for none."""

    loss: float = math.inf
    size: float = math.inf
    time: float = math.inf


def total(costs: Sequence[Sequence[Cost]], chosen: Sequence[int], what: Goal) -> float:
    """Return the sum of one cost over all layers.

    Example:
        >>> total([[Cost(size=1), Cost(size=3)], [Cost(size=4)]], (1, 0), "size")
        7.0
    """
    return math.fsum(getattr(row[index], what) for row, index in zip(costs, chosen, strict=True))


def choose(costs: Sequence[Sequence[Cost]], limits: Limits, goal: Goal) -> tuple[int, ...] | None:
    """Choose a candidate per layer that minimizes the sum of one cost within limits on the others.

    A multiple-choice knapsack problem, solved exactly as a mixed-integer linear program, as HAWQ-V3 chooses bits
    (Yao et al., 2021, https://arxiv.org/abs/2011.10680). Ties are broken by the other costs: among equal losses the
    smallest size, among equal sizes the smallest loss.

    Args:
        costs: For each layer, the cost of each candidate.
        limits: Limits for the sums.
        goal: The sum to minimize.

    Returns:
        The index of the candidate for each layer; None if no choice is within the limits.

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
    """As `choose`, without breaking ties; a choice is checked without the solver's tolerance.

    A choice that exceeds a limit by less than the tolerance is excluded and the solver runs again. After many of them,
    the limit is tightened, which excludes all choices as close to it.
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
