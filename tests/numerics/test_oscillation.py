"""Counting reversals of integers, and freezing at their average, compared with the definition for one weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_lightning.numerics.oscillation import OSCILLATES, Oscillation

courses = st.lists(st.integers(-3, 3), min_size=2, max_size=40)


def by_hand(course: list[int], momentum: float) -> tuple[float, float]:
    """Frequency and average of one weight, as described in the paper."""
    frequency, average, last, direction = 0.0, float(course[0]), course[0], 0
    for now in course[1:]:
        turned = (now > last) - (now < last)
        frequency = (1 - momentum) * frequency + momentum * (turned * direction < 0)
        average = (1 - momentum) * average + momentum * now
        direction, last = turned or direction, now
    return frequency, average


@settings(max_examples=60, deadline=None)
@given(courses, courses, st.floats(0.01, 0.5))
def test_each_weight_has_the_frequency_and_average_of_its_own_course(
    one: list[int], other: list[int], momentum: float
) -> None:
    length = min(len(one), len(other))
    state = Oscillation(torch.tensor([float(one[0]), float(other[0])]))
    for step in range(1, length):
        state.observe(torch.tensor([float(one[step]), float(other[step])]), momentum)
    for index, course in enumerate((one[:length], other[:length])):
        frequency, average = by_hand(course, momentum)
        assert float(state.frequency[index]) == pytest.approx(frequency, abs=1e-5)
        assert float(state.average[index]) == pytest.approx(average, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(courses, st.floats(0.0, 0.3), st.integers(1, 3))
def test_what_is_frozen_stays_at_the_integer_nearest_to_its_average(
    course: list[int], threshold: float, end: int
) -> None:
    state = Oscillation(torch.tensor([float(course[0])]))
    ends = torch.tensor(-end), torch.tensor(end)
    frozen_at = None
    for now in course[1:]:
        state.observe(torch.tensor([float(now)]), 0.1)
        before = int(state.integers)
        state.freeze(threshold, ends)
        if frozen_at is None and bool(state.frozen):
            frozen_at = round(float(state.average))
            assert float(state.frequency) > threshold
            assert max(abs(frozen_at), abs(before)) < end
        if frozen_at is not None:
            assert int(state.integers) == frozen_at
    assert (frozen_at is not None) == bool(state.frozen)


def test_a_drifting_weight_does_not_oscillate() -> None:
    state = Oscillation(torch.tensor([0.0]))
    for integer in (0, 1, 1, 2, 3, 3, 4):
        state.observe(torch.tensor([float(integer)]), 0.5)
    assert float(state.frequency) == 0.0


def test_counts_leave_frozen_weights_out_of_those_that_oscillate() -> None:
    state = Oscillation(torch.zeros(3))
    for integer in (1.0, 0.0, 1.0, 0.0):
        state.observe(torch.tensor([integer, integer, 0.0]), 0.5)
    assert float(state.frequency[0]) > OSCILLATES
    assert [int(count) for count in state.counts()] == [2, 0]
    state.frozen[0] = True
    assert [int(count) for count in state.counts()] == [1, 1]


def test_the_state_of_another_weight_is_refused() -> None:
    state = Oscillation(torch.zeros(3))
    with pytest.raises(ValueError, match="'integers' has the shape"):
        state.load_state_dict(Oscillation(torch.zeros(2)).state_dict())
