"""train.py experiment=detection, run as a user runs it, followed by sensitivity, comparison and method=auto."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pycocotools")

from qat_lightning import load_quantized
from qat_lightning.compare.__main__ import main as compare
from qat_lightning.sensitivity.__main__ import main as sensitivity
from tests.app.test_train import train
from tests.support.boxed_images import make_boxed_images

NET = [f"model.module.net.{name}" for name in ("width=4", "channels=8", "tower=1")]
TINY = [
    "experiment=detection", "trainer=cpu", "logger=csv", "data.num_classes=2", "data.image_size=64",
    "data.datamodule.suffix=.png", "data.datamodule.batch_size=4", "trainer.max_epochs=2", *NET,
]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return [*TINY, f"data.datamodule.path={make_boxed_images(tmp_path / 'cells')}"]


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@pytest.mark.slow
def test_a_run_is_compared_and_its_layers_are_ranked(words: list[str], tmp_path: Path) -> None:
    done = train(tmp_path, "method=qat", *words)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    result = result_of(out)
    variants = {f"{name}/test/{key}" for name in ("float", "fake_quant", "int8") for key in ("map", "map_50", "loss")}
    assert variants <= result["metrics"].keys()
    assert {"val/map", "val/map_50", "val/loss"} <= result["fit_metrics"].keys()
    assert (out / "checkpoints" / "last.ckpt").is_file()
    levels = load_quantized(out / "model.int8")(torch.zeros(1, 3, 64, 64))
    assert [scores.shape for scores, _, _ in levels] == [(1, 2, 8, 8), (1, 2, 4, 4), (1, 2, 2, 2)]
    page = tmp_path / "page.html"
    assert compare([str(out), "--html", str(page)]) == 0
    assert "test/map" in page.read_text()
    level = logging.getLogger("lightning.pytorch").level
    assert sensitivity([str(out), "--validation-batches", "1", "--calibration-batches", "1", "--no-plot"]) == 0
    assert logging.getLogger("lightning.pytorch").level == level, "a command changes nothing for its process"
    with (out / "sensitivity" / "layers.csv").open() as file:
        assert {"head.scores", "stem.0"} <= {row["name"] for row in csv.DictReader(file)}


@pytest.mark.nightly
def test_a_target_is_looked_for(words: list[str], tmp_path: Path) -> None:
    done = train(tmp_path, "method=auto", "target.max_drop=0.5", *words)
    assert done.returncode == 0, done.stderr
    assert "static keeps the target" in done.stdout
    assert {"float/test/map", "int8/test/map"} <= result_of(tmp_path / "out")["metrics"].keys()


@pytest.mark.nightly
def test_two_processes_measure_what_one_does(words: list[str], tmp_path: Path) -> None:
    done = train(tmp_path, "method=float", *words)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    # the same weights, and validation images that two processes share unevenly
    both = [f"ckpt_path={checkpoint}", "trainer=ddp_sim", "hydra.run.dir=both", "data.datamodule.batch_size=3"]
    done = train(tmp_path, "method=float", *words, *both)
    assert done.returncode == 0, done.stderr
    one, two = (result_of(tmp_path / name)["metrics"] for name in ("out", "both"))
    for key in ("float/test/map", "float/test/map_50"):
        assert two[key] == pytest.approx(one[key], abs=1e-6)


@pytest.mark.slow
def test_a_faulty_table_is_one_message_before_anything_is_trained(words: list[str], tmp_path: Path) -> None:
    with (tmp_path / "cells" / "boxes.csv").open("a") as file:
        file.write("train,train0,red,1,1,99,9\n")
    done = train(tmp_path, "method=float", *words)
    assert done.returncode == 1
    shown = " ".join(done.stderr.replace("│", " ").split())
    assert "a box is not within its image, which is 64 x 64 pixels" in shown
    assert not (tmp_path / "out" / "checkpoints").exists()
