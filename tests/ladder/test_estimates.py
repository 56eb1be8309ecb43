"""Which steps are worth a conversion and a validation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qat_lightning import Scheme
from qat_lightning.errors import ConversionError
from qat_lightning.ladder.estimates import CLOSER_DB, Estimates
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.ranking import output_sqnr, rank_layers
from qat_lightning.ladder.workshop import Making, Workshop
from qat_lightning.numerics.sqnr import EQUAL_DB
from tests.ladder.lit import CPU, trained

STATIC, CORRECTED = Plan(), Plan(bias_correction=True)


def test_a_step_must_gain_as_much_as_is_asked_for() -> None:
    measured: list[Plan] = []

    def sqnr(plan: Plan) -> float:
        measured.append(plan)
        return {"none": 12.0, "exact": 12.0 + CLOSER_DB, "replace_relu6": 11.0}[plan.equalization]

    estimates = Estimates(sqnr)
    assert estimates.no_closer(replace(STATIC, equalization="exact"), STATIC) == ""
    assert "goes from 12.0 to 11.0 dB" in estimates.no_closer(replace(STATIC, equalization="replace_relu6"), STATIC)
    assert measured.count(STATIC) == 1


@pytest.mark.parametrize("best", [EQUAL_DB, -EQUAL_DB, float("nan")])
def test_an_error_that_cannot_be_compared_is_left_to_the_validation(best: float) -> None:
    assert Estimates(lambda plan: 1.0 if plan.bias_correction else best).no_closer(CORRECTED, STATIC) == ""


def test_a_network_that_cannot_be_estimated_is_left_to_the_validation() -> None:
    def fails(plan: Plan) -> float:
        raise ConversionError("no")

    assert Estimates(fails).no_closer(CORRECTED, STATIC) == ""


@pytest.mark.parametrize(
    "plan",
    [Plan(adaround=9), Plan(sequential_mse=True), Plan(epochs=1), Plan(kind="weight_only")],
    ids=["adaround", "sequential_mse", "qat", "weight_only"],
)
def test_what_takes_long_is_not_estimated(plan: Plan) -> None:
    def never(plan: Plan) -> float:
        raise AssertionError(plan)

    assert Estimates(never).no_closer(plan, STATIC) == Estimates(never).no_closer(STATIC, plan) == ""


def test_estimates_and_rankings_are_of_the_plan_that_is_tried(tmp_path: Path) -> None:
    workshop = Workshop(CPU, *trained(), Making(), tmp_path / "float.ckpt")
    coarse = Plan(scheme=Scheme(weight_bits=3, weight_granularity="per_tensor"))
    static = output_sqnr(workshop, coarse)
    assert output_sqnr(workshop, coarse) == static
    assert output_sqnr(workshop, replace(coarse, bias_correction=True)) > static + CLOSER_DB
    assert output_sqnr(workshop, replace(coarse, scheme=Scheme())) > static + 10
    first, *others = rank_layers(workshop, coarse)
    left = {name: output_sqnr(workshop, replace(coarse, exclude=(name,))) for name in (first, *others)}
    assert len(left) == 3
    assert min(left.values()) > static
    assert first in rank_layers(workshop, replace(coarse, exclude=(others[-1],)))
    assert first not in rank_layers(workshop, replace(coarse, exclude=(first,)))
