"""A trial that lacks a metric of ``objective=``: its figures are kept, and a search does not train it."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qat_lightning.compare import find_runs
from qat_lightning.errors import CombinationError
from qat_lightning.sweep.objective import check_objective, objective_of
from qat_lightning.sweep.trial import Trial
from tests.sweep.running import results, statuses, sweep
from tests.sweep.test_ending import CFG, training

PTQ = "qat_lightning.PostTrainingQuantization"
METRICS = {"val/acc": 0.5, "int8/test/acc": 0.75}


def settings(objective: Any, method: str = "qat", **quantization: Any) -> Any:
    more: dict[str, Any] = {"objective": objective, "method": {"name": method}}
    return OmegaConf.merge(CFG, more | ({"quantization": quantization} if quantization else {}))


def test_a_misspelt_objective_costs_no_finished_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = settings("int8/tst/acc", kind="static")
    trial = Trial(tmp_path, ["seed=1"], of_sweep=False, resume=False)
    assert trial.attempt(training(lambda: None), cfg) is None
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["metrics"], result["objective"]) == ("completed", {"int8/test/acc": 1.0}, None)
    message = "objective=int8/tst/acc is not a metric of this run: use int8/test/acc."
    assert result["error"] == {"type": "NoObjective", "message": message}
    assert message in caplog.text
    (run,) = find_runs([tmp_path])
    assert run.status == "finished"


@pytest.mark.parametrize(
    ("objective", "values"),
    [(None, None), ("val/acc", [0.5]), (["val/acc", "int8/test/acc"], [0.5, 0.75]), (["val/acc", "none"], None)],
)
def test_an_objective_has_all_its_values_or_none(objective: Any, values: list[float] | None) -> None:
    found, why = objective_of(settings(objective), METRICS)
    assert found == values
    assert bool(why) == (objective is not None and values is None)


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (settings("int8/test/acc", "float"), "method=float creates no int8 network"),
        (settings(["val/acc", "fake_quant/test/acc"], "finetune"), "method=finetune creates no fake_quant network"),
        (settings("speedup", "float"), "method=float creates no int8 network to measure"),
        (settings("int8/latency_ms", "qat", convert_on_fit_end=False), "method=qat creates no int8 network"),
        (settings("fake_quant/test/acc", "dynamic", _target_=PTQ, kind="dynamic"), "creates no fake_quant network"),
    ],
)
def test_a_search_refuses_what_the_method_cannot_have(cfg: Any, says: str) -> None:
    with pytest.raises(CombinationError, match=says):
        check_objective(cfg)


@pytest.mark.parametrize(
    "cfg",
    [
        settings(None, "float"),
        settings("val/acc", "float"),
        settings("float/test/acc", "float"),
        settings("int8/test/acc", "qat", kind="dynamic"),
        settings("fake_quant/test/acc", "qat", kind="dynamic"),
        settings("fake_quant/test/acc", "ptq", _target_=PTQ, kind="static"),
        settings("int8/test/acc", "auto", _target_=PTQ),
    ],
)
def test_a_search_accepts_what_a_run_may_have(cfg: Any) -> None:
    check_objective(cfg)


@pytest.mark.slow
def test_float_runs_of_a_grid_are_compared_though_the_objective_is_of_int8(tmp_path: Path) -> None:
    words = ["method=float,qat", "objective=int8/test/acc", "logger=csv"]
    done = sweep(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert statuses(tmp_path) == {0: "completed", 1: "completed"}
    assert "method=float creates no int8 network" in " ".join(done.stdout.replace("│", " ").split())
    found = results(tmp_path)
    assert (found[0]["objective"], found[1]["objective"]) == (None, [found[1]["metrics"]["int8/test/acc"]])
    assert {run.status for run in find_runs([tmp_path / "sweep"])} == {"finished"}
    again = sweep(tmp_path, *words, "resume=true")
    assert again.returncode == 0, again.stderr
    assert results(tmp_path) == found, "no trial was trained again"


@pytest.mark.slow
def test_a_search_trains_no_trial_that_cannot_have_the_objective(tmp_path: Path) -> None:
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "seed=range(0,3)"]
    failures = "hydra.sweeper.max_failure_rate=1.0"
    sweep(tmp_path, *search, failures, "objective=int8/test/acc", "method=float", "logger=csv")
    assert set(statuses(tmp_path).values()) == {"skipped"}
    assert not list(tmp_path.rglob("*.ckpt"))
