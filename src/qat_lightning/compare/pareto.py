"""The Pareto front: points that no other point dominates."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float] | None], tolerances: Sequence[float] = ()) -> list[bool]:
    """Find the points that no other point dominates.

    A point dominates another if it is not worse on any axis and better on one, by more than the tolerance. Points that
    are equal within the tolerances do not dominate each other.

    Args:
        points: Coordinates; larger is better on every axis. None for a point that cannot be compared.
        tolerances: For each axis, the largest difference that does not count; 0 by default.

    Returns:
        Whether each point is on the front; never for None.

    Example:
        >>> pareto_front([(0.98, -3.0), (0.97, -1.0), (0.97, -2.0), (0.98, -3.0), None])
        [True, True, False, True, False]
        >>> pareto_front([(0.98, -3.001), (0.98, -3.0)]), pareto_front([(0.98, -3.001), (0.98, -3.0)], (0.0, 0.01))
        ([False, True], [True, True])
    """
    found = [
        point is not None and not any(other is not None and _dominates(other, point, tolerances) for other in points)
        for point in points
    ]
    # With tolerances, domination can be cyclic, which would leave an empty front.
    return found if not tolerances or any(found) else pareto_front(points)


def _dominates(one: Sequence[float], other: Sequence[float], tolerances: Sequence[float]) -> bool:
    # a difference that equals the tolerance does not count, whatever floating-point arithmetic adds to it
    limits = [tolerance * (1 + 1e-6) for tolerance in tolerances] or [0.0] * len(one)
    gains = [(a - b, limit) for a, b, limit in zip(one, other, limits, strict=True)]
    return all(gain >= -limit for gain, limit in gains) and any(gain > limit for gain, limit in gains)
