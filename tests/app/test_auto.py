"""train.py method=auto, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat_lightning import load_quantized
from qat_lightning.compare.__main__ import main as compare
from tests.app.test_train import FAST, train
from tests.sweep.running import offline_runs


@pytest.mark.slow
def test_a_target_is_looked_for_and_shown(tmp_path: Path) -> None:
    words = ["method=auto", "target.max_drop=0.5", "target.max_size_mb=2", "model.module.net.width=8", *FAST]
    done = train(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "static keeps the target" in done.stdout
    out = tmp_path / "out"
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "completed"
    assert {"float/test/acc", "int8/test/acc", "speedup"} <= result["metrics"].keys()
    assert "val/acc" in result["fit_metrics"]
    load_quantized(out / "model.int8")
    runs = {run["name"]: run for run in offline_runs(out)}
    name = "auto-fx-x86-small_mobilenet"
    assert runs.keys() == {name, f"{name}-float", f"{name}-static"}
    assert runs[name]["run_id"] == result["wandb"]["id"]
    assert runs[f"{name}-static"]["summary"]["ladder/drop"] <= 0.5
    (floats,) = (tmp_path / "outputs" / "baselines").glob("*/float.ckpt")
    assert floats.is_file()
    page = tmp_path / "page.html"
    assert compare([str(out), "--html", str(page)]) == 0
    assert "a drop of at most 0.5, at most 2 MB" in page.read_text()
    again = train(tmp_path, *words, "resume=true")
    assert again.returncode == 0
    assert "there is nothing to do" in " ".join(again.stdout.split())


@pytest.mark.slow
def test_a_target_that_cannot_be_reached_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    done = train(tmp_path, "method=auto", "target.max_size_mb=0.0001", *FAST)
    assert done.returncode == 1
    assert "cannot be reached" in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "outputs" / "baselines").exists()
