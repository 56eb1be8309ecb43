"""Sweeps of Hydra apps other than train.py, whose loggers have only hyperparameters of the LightningModule."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat_lightning.compare import Limits, Run, compare, decide, find_runs

CONFIG = """
task_name: train
tags: [dev]
seed: null
train: true
ckpt_path: null
paths:
  root_dir: ${oc.env:PROJECT_ROOT}
  output_dir: ${hydra:runtime.output_dir}
data: {_target_: src.data.DigitsDataModule, batch_size: 64}
model:
  _target_: src.models.LitModule
  optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 0.001}
callbacks:
  model_checkpoint: {_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: "${paths.output_dir}/checkpoints"}
trainer: {_target_: lightning.Trainer, max_epochs: 3, default_root_dir: "${paths.output_dir}"}
"""


def trial(folder: Path, overrides: list[str], part: dict[str, Any], logged: dict[str, Any], **metrics: float) -> None:
    """The folder of a trial, as Hydra and a CSVLogger leave it."""
    (folder / ".hydra").mkdir(parents=True)
    config = yaml.safe_load(CONFIG)
    config["callbacks"] |= part
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    logs = folder / "csv" / "version_0"
    logs.mkdir(parents=True)
    (logs / "hparams.yaml").write_text(yaml.safe_dump(logged))
    figures = {"float/test/acc": 0.98, "float/size_mb": 4.0, "float/latency_ms": 4.0, "int8/size_mb": 1.0} | metrics
    (logs / "metrics.csv").write_text(
        ",".join(["step", *figures]) + "\n" + ",".join(["9", *map(str, figures.values())])
    )


def qat(mode: str, start: float) -> dict[str, Any]:
    target = "qat_lightning.QuantizationAwareTraining"
    return {"qat": {"_target_": target, "mode": mode, "backend": "x86", "start": start}}


@pytest.fixture
def nine(tmp_path: Path) -> Path:
    """Three modes by three starts, which the hyperparameters do not contain."""
    for place, (mode, start) in enumerate(product(("eager", "fx", "pt2e"), (0.1, 0.3, 0.5))):
        words = [f"callbacks.qat.mode={mode}", f"callbacks.qat.start={start}"]
        figures = {"int8/test/acc": 0.97 - 0.001 * place, "int8/latency_ms": 1.0 + 0.1 * place}
        trial(tmp_path / str(place), words, qat(mode, start), {"lr": 0.001}, **figures)
    return tmp_path


def test_nine_different_runs_are_nine_rows_with_the_right_winner(nine: Path) -> None:
    comparison = compare(find_runs([nine]))
    labels = [c.label for c in comparison.configurations]
    assert len(labels) == 9
    assert labels[0] == "eager start=0.1"
    assert {s.label for s in comparison.settings} == {"mode", "start"}
    assert decide(comparison, Limits(prefer="score")).winner.label == "eager start=0.1"
    assert all(c.score.seeds == 1 for c in comparison.configurations)


def test_they_are_nine_where_wandb_holds_the_hyperparameters(nine: Path, offline: Path) -> None:
    (nine / "0" / "csv" / "version_0" / "metrics.csv").unlink()
    shutil.copytree(offline / "wandb", nine / "0" / "wandb", symlinks=True)
    runs = find_runs([nine])
    assert [run.wandb_id for run in runs if run.wandb_id] == ["aaaa"]
    labels = [c.label for c in compare(runs).configurations]
    assert len(labels) == 9
    assert not any("aaaa" in label for label in labels)


def test_a_choice_of_a_config_group_is_the_name(tmp_path: Path) -> None:
    for place, (choice, part) in enumerate(
        {"fx_x86": qat("fx", 0.3), "pt2e_x86": qat("pt2e", 0.5), "none": {}}.items()
    ):
        metrics = {"int8/test/acc": 0.9 + 0.01 * place} if part else {}
        trial(tmp_path / str(place), [f"callbacks={choice}"], part, {"lr": 0.1}, **metrics)
    assert {c.label for c in compare(find_runs([tmp_path])).configurations} == {"fx_x86", "pt2e_x86", "none"}


def test_without_hydra_what_the_callback_logged_tells_runs_apart() -> None:
    def run(name: str, **said: Any) -> Run:
        config = {"lr": 0.1, **{f"quantization/{key}": value for key, value in said.items()}}
        variant = "int8" if said else "float"
        return Run(name, name, config=config, metrics={f"{variant}/test/acc": 0.9}, wandb_id=name)

    auto = {"method": "QuantizationAwareTraining", "mode": "auto", "start": 0.3}
    runs = [
        run("x1"),
        run("x2", **auto, chosen_mode="fx"),
        run("x3", **auto, chosen_mode="pt2e"),
        run("x4", **(auto | {"method": "PostTrainingQuantization", "mode": "fx"}), chosen_mode="fx"),
    ]
    labels = {c.label for c in compare(runs).configurations}
    assert labels == {"float", "qat auto fx", "qat auto pt2e", "ptq fx fx"}


def test_a_float_run_of_the_same_training_is_the_baseline_whatever_the_callback_is_called(tmp_path: Path) -> None:
    trial(tmp_path / "0", [], {}, {}, **{"float/test/acc": 0.99})
    trial(tmp_path / "1", ["+callbacks=qat"], qat("fx", 0.3), {}, **{"int8/test/acc": 0.97})
    (found,) = (c for c in compare(find_runs([tmp_path])).configurations if c.variant == "int8")
    assert found.baseline == "float runs"
    assert found.drop.mean == pytest.approx(2.0)


def test_a_whole_configuration_in_the_logger_is_what_the_run_made_of_it(tmp_path: Path) -> None:
    """Like train.py, which changes the number of epochs if trials share a float run."""
    trial(tmp_path / "0", [], {}, {}, **{"int8/test/acc": 0.9})
    whole = yaml.safe_load(CONFIG) | {"trainer": {"max_epochs": 20}, "quantization/mode": "fx"}
    (tmp_path / "0" / "csv" / "version_0" / "hparams.yaml").write_text(yaml.safe_dump(whole))
    (run,) = find_runs([tmp_path])
    assert run.config["trainer"] == {"max_epochs": 20}
    assert json.dumps(run.config, default=str)


def test_the_saved_file_has_the_size_of_int8_where_nothing_measured_it(tmp_path: Path) -> None:
    for name, metric in (("0", "int8/test/acc"), ("1", "fake_quant/test/acc")):
        trial(tmp_path / name, [], qat("fx", 0.3), {})
        logs = tmp_path / name / "csv" / "version_0"
        (logs / "metrics.csv").write_text(f"step,{metric}\n9,0.9\n")
        (tmp_path / name / "model.int8").write_bytes(bytes(250_000))
    tested, simulated = find_runs([tmp_path])
    assert tested.metrics["int8/size_mb"] == 0.25
    assert "int8/size_mb" not in simulated.metrics
