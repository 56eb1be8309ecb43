"""How long a rung will take: told by what was tried, or measured on a piece of it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qat_lightning import Scheme, Target, reach
from qat_lightning.compare.metric import Metric
from qat_lightning.ladder import climb
from qat_lightning.ladder.choice import Attempt
from qat_lightning.ladder.clock import Clock, OutOfTime
from qat_lightning.ladder.costs import expected_minutes, unknown_parts
from qat_lightning.ladder.parts import Parts
from qat_lightning.ladder.pieces import minutes_of
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.rungs import Known
from qat_lightning.ladder.store import Store
from qat_lightning.ladder.workshop import Making, Workshop
from tests.ladder.lit import CPU, LitBlock, trained

STATIC = Attempt("static", Plan(), minutes=0.5)
SEQUENTIAL = Attempt("sequential_mse", Plan(sequential_mse=True), minutes=2.0)
LEARNED = Attempt("adaround", Plan(adaround=100), minutes=5.0)
SHORT = Attempt("qat_short", Plan(epochs=2), minutes=6.5)


def test_a_plan_like_one_that_was_tried_takes_as_long() -> None:
    tried = [STATIC, SEQUENTIAL, LEARNED, SHORT]
    assert expected_minutes(Plan(bias_correction=True), tried, {}) == 0.5
    assert expected_minutes(Plan(adaround=100, exclude=("net.0",)), tried, {}) == 5.0
    assert expected_minutes(Plan(epochs=8), tried, {}) == pytest.approx(24.5), "epochs are scaled, and nothing else"


def test_of_attempts_that_are_alike_the_last_tells_the_time() -> None:
    slow = replace(STATIC, minutes=6.0)
    assert expected_minutes(Plan(bias_correction=True), [slow, STATIC], {}) == 0.5
    assert expected_minutes(Plan(adaround=100), [slow, STATIC], {"adaround": 3.0}) == 3.5


def test_what_no_attempt_tells_is_added() -> None:
    by_blocks = Plan(sequential_mse=True, adaround=100, adaround_blocks=True)
    assert unknown_parts(by_blocks, [STATIC, LEARNED]) == {"sequential_mse", "adaround_blocks"}
    assert unknown_parts(by_blocks, [STATIC, SEQUENTIAL, LEARNED]) == {"adaround_blocks"}
    assert expected_minutes(by_blocks, [STATIC, SEQUENTIAL, LEARNED], {"adaround_blocks": 3.0}) == 5.0
    assert expected_minutes(Plan(epochs=8), [STATIC], {"epoch": 1.0}) == 8.5


def test_what_failed_or_was_cut_short_tells_nothing() -> None:
    for failed in (replace(SHORT, cut_short=True), replace(SHORT, error="NetworkError: no")):
        assert unknown_parts(Plan(epochs=8), [STATIC, failed]) == {"epoch"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("float")
    model, data = trained(of=LitBlock)
    trainer = CPU(logger=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "float.ckpt", weights_only=True)
    return Workshop(CPU, model, data, Making(calibration_batches=4), folder / "float.ckpt")


FEW_BITS = Plan(scheme=Scheme(weight_bits=3))


def test_the_time_of_learned_rounding_grows_with_its_iterations(workshop: Workshop) -> None:
    few = minutes_of("adaround", replace(FEW_BITS, adaround=10), workshop)
    many = minutes_of("adaround", replace(FEW_BITS, adaround=100_000), workshop)
    assert 0 < 20 * few < many


@pytest.mark.nightly
def test_the_measured_pieces_tell_about_how_long_the_whole_takes(workshop: Workshop, tmp_path: Path) -> None:
    static = Attempt("static", FEW_BITS, minutes=made(workshop, FEW_BITS, tmp_path))
    for plan in (
        replace(FEW_BITS, adaround=400),
        replace(FEW_BITS, adaround=400, adaround_blocks=True),
        FEW_BITS.trained(10),
    ):
        (part,) = unknown_parts(plan, [static])
        expected = expected_minutes(plan, [static], {part: minutes_of(part, plan, workshop)})
        took = made(workshop, plan, tmp_path)
        assert took / 3 < expected < 3 * took, part


def made(workshop: Workshop, plan: Plan, folder: Path) -> float:
    """Minutes that making a network takes."""
    began = time.monotonic()
    workshop.make(plan, folder, [], math.inf)
    return (time.monotonic() - began) / 60


@pytest.mark.nightly
def test_a_recipe_that_does_not_fit_is_left_out_and_its_cost_is_measured_once(tmp_path: Path) -> None:
    settings = {
        "scheme": Scheme(weight_bits=2, weight_granularity="per_tensor"),
        "metric": "val/loss",
        "calibration_batches": 4,
        "adaround_iterations": 10_000_000,
        "short_epochs": 0,
        "long_epochs": 0,
        "test": False,
    }
    float_run = trained(of=LitBlock)
    target = Target(max_drop=0.0, max_minutes=5)
    found = reach(CPU, *float_run, target, folder=tmp_path, **settings)  # type: ignore[arg-type]
    rungs = {attempt.rung: attempt for attempt in found.attempts}
    for name in ("adaround_blocks", "adaround"):
        assert not rungs[name].started
        assert rungs[name].error.startswith("not started: it takes about")
    assert rungs["wide_1_layers"].started, "what is cheaper is still tried"
    cost = tmp_path / "cost_adaround.json"
    assert json.loads(cost.read_text())["found"] > 5
    written = cost.stat().st_mtime_ns
    again = reach(CPU, *float_run, target, folder=tmp_path, resume=True, **settings)  # type: ignore[arg-type]
    assert [attempt.rung for attempt in again.attempts] == list(rungs)
    assert cost.stat().st_mtime_ns == written


def test_a_piece_that_does_not_fit_is_measured_once(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each training of a search takes half of the time that is left, to find that it takes too long."""
    measured: list[str] = []

    def too_long(part: str, *_: object) -> float:
        measured.append(part)
        raise OutOfTime

    monkeypatch.setattr(climb, "minutes_of", too_long)
    store = Store(tmp_path)
    floor = climb.Floor(Metric("val/acc", True), Parts((1.0,), (1,)), {}, 0.1)
    search = climb.Climb(workshop, store, floor, Target(max_drop=0.0, max_minutes=1), Known(), Plan(), lambda _: [])
    for epochs in (2, 8):
        assert search._expected(Plan(epochs=epochs), Clock(1, 0.0)) == math.inf
    assert measured == ["epoch"]
