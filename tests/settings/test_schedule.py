"""The schedule is a pure, monotone function, and raises clear errors for invalid points."""

import math
from dataclasses import FrozenInstanceError, asdict
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qat_lightning.errors import ConfigurationError
from qat_lightning.settings.schedule import Phase, QuantizationSchedule, SchedulePoint, TrainingPlan, reached, resolve

counts = st.integers(min_value=0, max_value=10_000)
shares = st.floats(min_value=0, max_value=1, allow_nan=False)
points = st.one_of(
    st.builds(SchedulePoint, st.just("epoch"), counts),
    st.builds(SchedulePoint, st.just("step"), counts),
    st.builds(SchedulePoint, st.just("fraction"), shares),
)
freezes = st.none() | points.filter(lambda point: point.at > 0)
bounded_plans = st.builds(
    TrainingPlan,
    steps_per_epoch=st.integers(1, 500),
    max_steps=st.none() | st.integers(0, 10_000),
    max_epochs=st.integers(0, 100),
)


@pytest.mark.parametrize(
    ("written", "unit", "at"),
    [
        (3, "epoch", 3),
        (0, "epoch", 0),
        (1, "epoch", 1),
        (1.0, "fraction", 1.0),
        (0.0, "fraction", 0.0),
        (np.int64(3), "epoch", 3),
        (np.float32(0.5), "fraction", 0.5),
        ({"epoch": 3}, "epoch", 3),
        ({"step": 1200}, "step", 1200),
        ({"fraction": 0.5}, "fraction", 0.5),
        ({"fraction": 1}, "fraction", 1.0),
        (MappingProxyType({"step": 2}), "step", 2),
        (OmegaConf.create({"epoch": 2}), "epoch", 2),
        (OmegaConf.create("{fraction: 0.25}"), "fraction", 0.25),
    ],
)
def test_every_way_to_write_a_point_is_read(written, unit, at):
    point = SchedulePoint.parse(written)
    assert (point.unit, point.at) == (unit, at)
    assert type(point.at) is (float if unit == "fraction" else int)


def test_none_is_never_and_a_point_stays_itself():
    assert SchedulePoint.parse(None) is None
    point = SchedulePoint("step", 3)
    assert SchedulePoint.parse(point) is point


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (True, "bool"),
        (False, "bool"),
        (np.bool_(True), "bool"),
        ("0.5", "str"),
        ([1], "list"),
        (-1, "whole number of 0 or more"),
        (-0.1, "0.0 to 1.0"),
        (1.5, "0.0 to 1.0"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ({}, "exactly one key"),
        ({"epoch": 1, "step": 2}, "epoch, step"),
        ({"epochs": 1}, "unknown key 'epochs'"),
        ({1: 1}, "unknown key 1"),
        ({"epoch": True}, "whole number"),
        ({"epoch": 1.0}, "whole number"),
        ({"epoch": -1}, "whole number"),
        ({"epoch": None}, "whole number"),
        ({"step": "3"}, "whole number"),
        ({"step": math.nan}, "whole number"),
        ({"fraction": True}, "0.0 to 1.0"),
        ({"fraction": -0.5}, "0.0 to 1.0"),
        ({"fraction": math.nan}, "0.0 to 1.0"),
        (OmegaConf.create({"epoch": 1, "step": 2}), "epoch, step"),
    ],
)
def test_an_impossible_point_is_refused_with_its_name_and_what_is_possible(written, said):
    with pytest.raises(ConfigurationError) as caught:
        QuantizationSchedule(freeze_batchnorm=written)
    message = str(caught.value)
    assert message.startswith("freeze_batchnorm=")
    assert said in message
    for form in ("{epoch: n}", "{step: n}", "{fraction: f}", "null"):
        assert form in message
    assert message.count("Write {epoch: n}") == 1


def test_an_unknown_unit_is_refused():
    with pytest.raises(ConfigurationError, match="'batch' is not a unit"):
        SchedulePoint("batch", 3)


@pytest.mark.parametrize("unbounded", [None, -1, math.inf])
def test_none_minus_one_and_infinity_are_no_limit(unbounded):
    assert TrainingPlan(10, unbounded, 3).total_steps == 30
    assert TrainingPlan(10, 7, unbounded).total_steps == 7
    assert TrainingPlan(unbounded, unbounded, 3).total_steps is None
    assert TrainingPlan(10, unbounded, unbounded).total_steps is None
    assert TrainingPlan(unbounded, 7, 3).total_steps == 7


def test_the_lesser_limit_ends_the_plan():
    assert TrainingPlan(10, 25, 3).total_steps == 25
    assert TrainingPlan(10, 35, 3).total_steps == 30


@pytest.mark.parametrize("field", ["steps_per_epoch", "max_steps", "max_epochs"])
@pytest.mark.parametrize("value", [-2, True, 1.5, math.nan, "3"])
def test_an_impossible_length_is_refused_with_its_name(field, value):
    with pytest.raises(ConfigurationError, match=f"^{field}="):
        TrainingPlan(**{field: value})


def test_a_fraction_of_a_plan_without_end_is_refused_with_what_to_type():
    schedule = QuantizationSchedule(start=0.5)
    with pytest.raises(ConfigurationError) as caught:
        schedule.phase(step=0, epoch=0, plan=TrainingPlan(steps_per_epoch=10))
    for part in ("start={fraction: 0.5}", "max_steps", "max_epochs", "{step: n}", "{epoch: n}"):
        assert part in str(caught.value)


def test_steps_and_epochs_need_no_end():
    plan = TrainingPlan()
    assert reached(SchedulePoint("step", 5), step=5, epoch=0, plan=plan)
    assert reached(SchedulePoint("epoch", 2), step=0, epoch=2, plan=plan)
    assert resolve(SchedulePoint("epoch", 2), plan) is None
    assert resolve(SchedulePoint("epoch", 2), TrainingPlan(steps_per_epoch=10)) == 20
    assert resolve(None, plan) is None


@pytest.mark.parametrize(
    ("fraction", "total", "step"),
    [
        (0.07, 100, 7),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.29, 100, 29),
        (0.25, 30, 8),
        (0.0, 9, 0),
        (1.0, 9, 9),
        (1e-7, 9, 1),
    ],
)
def test_a_fraction_is_the_first_step_with_that_share_behind_it(fraction, total, step):
    assert resolve(SchedulePoint("fraction", fraction), TrainingPlan(max_steps=total)) == step


@given(shares, st.integers(1, 10_000))
def test_a_fraction_never_comes_early_and_at_most_a_step_late(share, total):
    step = resolve(SchedulePoint("fraction", share), TrainingPlan(max_steps=total))
    written = Fraction(repr(share)) * total
    assert written <= step < written + 1


@given(st.integers(1, 10_000))
def test_the_whole_fraction_is_reached_by_no_training_step(total):
    point, plan = SchedulePoint("fraction", 1.0), TrainingPlan(max_steps=total)
    assert not reached(point, step=total - 1, epoch=0, plan=plan)
    assert reached(point, step=total, epoch=0, plan=plan)


@given(points, bounded_plans, counts, counts, counts, counts)
def test_once_reached_a_point_stays_reached(point, plan, step, more_steps, epoch, more_epochs):
    before = reached(point, step=step, epoch=epoch, plan=plan)
    after = reached(point, step=step + more_steps, epoch=epoch + more_epochs, plan=plan)
    assert after >= before


@given(points, st.integers(1, 50), st.integers(1, 20))
def test_in_a_regular_training_a_point_is_reached_exactly_from_its_step_on(point, steps_per_epoch, max_epochs):
    plan = TrainingPlan(steps_per_epoch=steps_per_epoch, max_epochs=max_epochs)
    at = resolve(point, plan)
    for step in range(steps_per_epoch * max_epochs):
        assert reached(point, step=step, epoch=step // steps_per_epoch, plan=plan) == (step >= at)


@given(points, freezes, st.none() | points, bounded_plans, counts, counts)
def test_the_phase_holds_one_answer_for_each_point(start, observers, batchnorm, plan, step, epoch):
    schedule = QuantizationSchedule(start, observers, batchnorm)
    phase = schedule.phase(step, epoch, plan)
    assert phase == schedule.phase(step, epoch, plan)
    assert phase.fake_quant == reached(start, step=step, epoch=epoch, plan=plan)
    assert phase.observers != reached(observers, step=step, epoch=epoch, plan=plan)
    assert phase.batchnorm_frozen == reached(batchnorm, step=step, epoch=epoch, plan=plan)


phases = st.builds(Phase, st.booleans(), st.booleans(), st.booleans())


@given(phases, phases)
def test_latching_keeps_all_that_was_reached(now, earlier):
    latched = now.latched(earlier)
    assert latched == latched.latched(earlier) == earlier.latched(now)
    assert latched.fake_quant >= earlier.fake_quant
    assert latched.observers <= earlier.observers
    assert latched.batchnorm_frozen >= earlier.batchnorm_frozen
    assert latched.scales_learn >= earlier.scales_learn


def test_a_longer_second_fit_does_not_undo_a_latched_point():
    schedule = QuantizationSchedule(start=0.5, freeze_observers=0.8)
    first = schedule.phase(step=9, epoch=0, plan=TrainingPlan(max_steps=10))
    second = schedule.phase(step=10, epoch=0, plan=TrainingPlan(max_steps=100))
    assert second == Phase(fake_quant=False, observers=True, batchnorm_frozen=False)
    assert second.latched(first) == Phase(fake_quant=True, observers=False, batchnorm_frozen=False)


@pytest.mark.parametrize("at_once", [0, 0.0, {"step": 0}, {"epoch": 0}, {"fraction": 0}])
def test_ranges_cannot_freeze_before_any_batch_was_seen(at_once):
    with pytest.raises(ConfigurationError, match=r"^freeze_observers=.*before any batch"):
        QuantizationSchedule(freeze_observers=at_once)


def test_batchnorm_can_be_frozen_from_the_first_step():
    phase = QuantizationSchedule(freeze_batchnorm=0).phase(step=0, epoch=0, plan=TrainingPlan())
    assert phase == Phase(fake_quant=True, observers=True, batchnorm_frozen=True)


def test_scales_learn_from_their_point_on_and_without_one_at_once():
    schedule, plan = QuantizationSchedule(learn_scales={"step": 5}), TrainingPlan(max_steps=10)
    assert [schedule.phase(step, 0, plan).scales_learn for step in (0, 4, 5, 9)] == [False, False, True, True]
    assert QuantizationSchedule().phase(0, 0, plan).scales_learn


def test_without_a_start_fake_quant_never_comes_on():
    assert not QuantizationSchedule(start=None).phase(step=10**9, epoch=10**6, plan=TrainingPlan()).fake_quant


def test_schedules_are_values():
    assert QuantizationSchedule(start={"epoch": 2}) == QuantizationSchedule(start=2)
    assert hash(QuantizationSchedule(2)) == hash(QuantizationSchedule(2))
    assert QuantizationSchedule(2) != QuantizationSchedule(3)
    with pytest.raises(FrozenInstanceError):
        QuantizationSchedule(2).start = None
    on = {"fake_quant": True, "observers": False, "batchnorm_frozen": True, "scales_learn": True}
    assert asdict(Phase(True, False, True)) == on
