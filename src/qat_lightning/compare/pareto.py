"""The Pareto front: what nothing else beats in everything."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float] | None]) -> list[bool]:
    """Find the points that no other point dominates.

    A point dominates another if it is at least as good on every axis and better on one. Equal points do not dominate
    each other, so all of them are on the front or none.

    Args:
        points: Coordinates, on every axis larger is better; None for what cannot be compared.

    Returns:
        Whether each point is on the front; never for None.

    Example:
        >>> pareto_front([(0.98, -3.0), (0.97, -1.0), (0.97, -2.0), (0.98, -3.0), None])
        [True, True, False, True, False]
    """
    return [
        point is not None and not any(other is not None and _dominates(other, point) for other in points)
        for point in points
    ]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
