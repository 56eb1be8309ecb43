"""A sweep with the basic launcher: skipped combinations, the shared float run, and errors."""

import json
from pathlib import Path

import pytest

from tests.sweep.running import results, statuses, sweep


@pytest.mark.slow
def test_combinations_are_skipped_and_the_float_run_is_trained_once(tmp_path: Path) -> None:
    words = ["method=qat,float,ptq", "backend=x86,xnnpack", "baseline=shared", "logger=csv"]
    done = sweep(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    # float has no backend, so both of its trials are possible, and are the same run
    expected = {0: "completed", 1: "skipped", 2: "completed", 3: "completed", 4: "completed", 5: "skipped"}
    assert statuses(tmp_path) == expected, done.stdout
    assert "mode='fx' does not support backend='xnnpack'" in " ".join(done.stdout.split())
    found = results(tmp_path)
    (baseline,) = (tmp_path / "outputs" / "baselines").iterdir()
    assert json.loads((baseline / "baseline.json").read_text())["sha256"]
    losses = {found[number]["metrics"]["float/test/loss"] for number in (0, 2, 3)}
    assert len(losses) == 1, "int8 is compared with the very run that method=float is"
    assert found[4]["metrics"]["int8/test/loss"]
    assert not (tmp_path / "sweep" / "4" / "checkpoints").exists(), "post-training takes the float run over"

    other = sweep(tmp_path, "method=qat,float", "backend=x86", "baseline=shared", "logger=csv", "resume=true")
    assert other.returncode == 1
    assert "which differs from this sweep" in " ".join(other.stderr.replace("│", " ").split())
    assert results(tmp_path) == found


@pytest.mark.slow
def test_finetune_continues_the_shared_float_run_and_is_its_control(tmp_path: Path) -> None:
    words = ["baseline=start", "baseline.float.trainer.max_epochs=2", "logger=none", "hydra.sweep.dir=sweep"]
    done = sweep(tmp_path, "method=float,finetune", "trainer.max_epochs=0,1", *words)
    assert done.returncode == 0, done.stderr
    score = {number: found["metrics"]["float/test/loss"] for number, found in results(tmp_path).items()}
    float_run, same, none, one = score[0], score[1], score[2], score[3]
    assert same == float_run, "the float run has its own number of epochs"
    assert none == float_run, "after no epoch, it is the float run's network"
    assert one != float_run
    assert len(list((tmp_path / "outputs" / "baselines").iterdir())) == 1

    words[-1] = "hydra.sweep.dir=calibrated"
    done = sweep(tmp_path, "method=ptq", "method.post_training=true,false", "trainer.max_epochs=1", *words)
    assert done.returncode == 0, done.stderr
    compared, trained_on = (found["metrics"] for found in results(tmp_path, "calibrated").values())
    assert compared["float/test/loss"] == float_run
    assert trained_on["float/test/loss"] == one, "calibrated after the same training as that of finetune"


@pytest.mark.slow
def test_the_default_of_optional_groups_is_one_trial_of_a_sweep(tmp_path: Path) -> None:
    done = sweep(tmp_path, "scheme=default,w4a8", "method=float,qat", "recipe=none", "export=none", "logger=none")
    assert done.returncode == 0, done.stderr
    expected = {0: "completed", 1: "completed", 2: "skipped", 3: "completed"}  # float has no scheme
    assert statuses(tmp_path) == expected, done.stdout
