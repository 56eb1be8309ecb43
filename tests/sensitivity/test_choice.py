"""The choice of a candidate per layer is optimal: compared with trying all."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qat_lightning.errors import MissingExtraError
from qat_lightning.sensitivity.choice import Cost, Limits, choose, total

pytest.importorskip("scipy")

COSTS = st.lists(
    st.lists(
        st.builds(
            Cost,
            loss=st.integers(0, 400).map(lambda n: n / 1000),
            size=st.integers(0, 100_000),
            time=st.integers(-20, 50).map(lambda n: n / 100),
        ),
        min_size=1,
        max_size=3,
    ),
    min_size=1,
    max_size=5,
)
LIMIT = st.one_of(st.just(math.inf), st.floats(0.0, 1.0))


def every_choice(costs: Any, limits: Limits) -> list[tuple[int, ...]]:
    """All choices within the limits."""
    found = itertools.product(*(range(len(row)) for row in costs))
    names = ("loss", "size", "time")
    return [c for c in found if all(total(costs, c, name) <= getattr(limits, name) for name in names)]


@settings(max_examples=150, deadline=None)
@example([[Cost()], [Cost(size=1), Cost(loss=0.001)]], math.inf, 0.9999999999999999, math.inf, "loss")
@given(COSTS, LIMIT, LIMIT, LIMIT, st.sampled_from(["loss", "size", "time"]))
def test_no_choice_is_better(costs: Any, loss: float, size: float, time: float, goal: Any) -> None:
    shares = {"loss": loss, "size": size, "time": time}
    most = {name: math.fsum(max(getattr(c, name) for c in row) for row in costs) for name in shares}
    limits = Limits(**{name: most[name] * share if math.isfinite(share) else share for name, share in shares.items()})
    possible, found = every_choice(costs, limits), choose(costs, limits, goal)
    if not possible:
        assert found is None
        return
    assert found in possible
    least = min(total(costs, other, goal) for other in possible)
    assert total(costs, found, goal) == pytest.approx(least, rel=1e-6, abs=1e-9)


def test_of_choices_that_lose_the_same_the_smallest_is_taken() -> None:
    costs = [[Cost(0.0, 4), Cost(0.0, 8)], [Cost(0.1, 4), Cost(0.0, 8)]]
    assert choose(costs, Limits(), "loss") == (0, 1)
    assert choose(costs, Limits(size=12), "size") == (0, 0)


def test_a_limit_that_is_met_exactly_is_kept() -> None:
    costs = [[Cost(1 / 3, 1), Cost(0.0, 2)] for _ in range(3)]
    assert choose(costs, Limits(loss=total(costs, (0, 0, 0), "loss")), "size") == (0, 0, 0)
    assert choose(costs, Limits(size=5), "loss") is not None
    assert choose(costs, Limits(size=2), "loss") is None


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match=r"qat-lightning\[sensitivity\]"):
        choose([[Cost()]], Limits(), "loss")
