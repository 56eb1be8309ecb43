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
    assert "mode='fx' has no backend='xnnpack'" in " ".join(done.stdout.split())
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
