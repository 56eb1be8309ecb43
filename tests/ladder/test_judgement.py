"""The paired bootstrap, as a function of numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat_lightning.errors import ConfigurationError
from qat_lightning.ladder.judgement import Drop, paired_drop
from qat_lightning.ladder.target import Target

METRIC = st.floats(-100, 100)
PARTS = st.lists(st.tuples(METRIC, METRIC, st.integers(1, 64)), min_size=2, max_size=30)


@given(PARTS)
def test_the_mean_is_weighted_by_samples_and_inside_of_the_interval(parts: list[tuple[float, float, int]]) -> None:
    base, other, samples = map(list, zip(*parts, strict=True))
    drop = paired_drop(base, other, samples, draws=200)
    wanted = np.average(np.subtract(base, other), weights=samples)
    assert drop.mean == pytest.approx(wanted, abs=1e-4), "a millionth of the metric"
    assert drop.low <= drop.mean <= drop.high
    assert drop.parts == len(parts)


@given(PARTS, st.floats(-10, 10))
def test_what_both_have_in_common_does_not_matter(parts: list[tuple[float, float, int]], shift: float) -> None:
    base, other, samples = map(list, zip(*parts, strict=True))
    plain = paired_drop(base, other, samples, draws=100)
    moved = paired_drop([b + shift for b in base], [o + shift for o in other], samples, draws=100)
    for end in ("mean", "low", "high"):
        assert getattr(moved, end) == pytest.approx(getattr(plain, end), abs=2e-4)


@given(PARTS)
def test_a_loss_is_judged_the_other_way_round(parts: list[tuple[float, float, int]]) -> None:
    base, other, samples = map(list, zip(*parts, strict=True))
    up = paired_drop(base, other, samples, draws=100)
    down = paired_drop(base, other, samples, draws=100, larger_is_better=False)
    assert down.mean == pytest.approx(-up.mean, abs=1e-9)
    assert down.low == pytest.approx(-up.high, abs=1e-6)
    assert down.high == pytest.approx(-up.low, abs=1e-6)


@given(st.lists(METRIC, min_size=2, max_size=20), METRIC)
def test_the_same_loss_everywhere_has_no_width(base: list[float], loss: float) -> None:
    drop = paired_drop(base, [value - loss for value in base], [1] * len(base), draws=100)
    assert drop.high - drop.low == pytest.approx(0, abs=1e-9)


@given(PARTS)
def test_the_same_values_give_the_same_interval(parts: list[tuple[float, float, int]]) -> None:
    base, other, samples = map(list, zip(*parts, strict=True))
    assert paired_drop(base, other, samples, draws=50) == paired_drop(base, other, samples, draws=50)


def test_the_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        base = random.normal(size=40)
        other = base - random.normal(0.5, 1.0, size=40)
        drop = paired_drop(base.tolist(), other.tolist(), [8] * 40, draws=400)
        inside += drop.low <= 0.5 <= drop.high
    assert 0.88 <= inside / 300 <= 0.99


def test_one_part_says_nothing_of_another() -> None:
    drop = paired_drop([0.9], [0.8], [100])
    assert drop.mean == pytest.approx(0.1)
    assert drop == Drop(drop.mean, -math.inf, math.inf, 1)
    assert drop.undecided(0.05)
    assert drop.undecided(0.5)
    assert Drop.from_dict(json.loads(json.dumps(drop.to_dict()))) == drop


def test_undecided_is_what_has_the_limit_inside() -> None:
    assert Drop(0.2, 0.1, 0.3, 9).undecided(0.1)
    assert not Drop(0.2, 0.1, 0.3, 9).undecided(0.3)
    assert not Drop(0.2, 0.1, 0.3, 9).undecided(0.05)
    assert not Drop(0.2, 0.1, 0.3, 9).undecided(None)


@pytest.mark.parametrize("pairs", [([], [], []), ([1.0], [1.0, 2.0], [1]), ([1.0, math.nan], [1.0, 1.0], [1, 1])])
def test_what_is_no_pair_is_refused(pairs: tuple[list[float], list[float], list[int]]) -> None:
    with pytest.raises(ConfigurationError):
        paired_drop(*pairs)


@given(right=st.integers(500, 1000), lost=st.integers(1, 20), parts=st.integers(1, 10))
def test_a_drop_that_is_exactly_the_limit_keeps_it(right: int, lost: int, parts: int) -> None:
    """Of 1000 images in 10 batches; metrics are float32."""
    shares = [(right - lost * (place < parts), right) for place in range(10)]
    base = [torch.tensor(of_float / 1000).item() for _, of_float in shares]
    other = [torch.tensor(of_int8 / 1000).item() for of_int8, _ in shares]
    drop = paired_drop(base, other, [100] * 10, draws=50)
    limit = round(lost * parts / 10 / 1000, 8)  # as a person writes it
    assert Target(max_drop=limit).missed(drop.mean, None, None) == {}
    assert Target(max_drop=limit - 1e-5).missed(drop.mean, None, None).keys() == {"drop"}
