"""QuantizationMonitor under a real Trainer: what reaches the loggers, and that the fit is as without it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from qat_lightning import QuantizationMonitor
from qat_lightning.errors import ConfigurationError
from qat_lightning.flows.base import fake_quantizers
from qat_lightning.monitoring import COLUMNS
from tests.callbacks.lit import MODES, Lit, assert_same_state, loader, qat, state, trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"every_n_steps": True}, "every_n_steps=True"),
        ({"every_n_steps": 2.5}, "every_n_steps=2.5"),
        ({"samples": -1}, "samples=-1"),
        ({"curves": "scale"}, "give a list"),
        ({"curves": ["speed"]}, "'speed' is unknown"),
        ({"curves": ["layer"]}, "'layer' is unknown"),
        ({"histograms": "no"}, "histograms='no'"),
    ],
)
def test_arguments_are_checked_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        QuantizationMonitor(**arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_fit_is_the_same_with_it(mode: str, settings: dict[str, Any]) -> None:
    ended = []
    for more in ([], [QuantizationMonitor(every_n_steps=1)]):
        torch.manual_seed(0)
        module = Lit()
        module.net.drop.p = 0.3
        trainer(qat(mode, start={"step": 1}, convert_on_fit_end=False), *more, **settings).fit(
            module, loader(shuffle=True)
        )
        ended.append(state(module))
        assert not any(fq._forward_hooks for _, fq in fake_quantizers(module))
    assert_same_state(*ended)
    (monitor,) = more
    rows = {row.layer: row for row in monitor.layers}
    assert rows["features.0"].weight_sqnr_db > 30
    assert rows["features.0"].activation_sqnr_db > 20
    assert rows["head"].weight_sqnr_db > 30


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"every_n_steps": 3}, [0, 3, 6, 7]),
        ({"every_n_steps": 100}, [0, 7]),
    ],
)
def test_every_nth_step_and_the_last_are_measured(settings: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(qat(start={"step": 3}), QuantizationMonitor(**settings), logger=logger).fit(Lit(), loader())
    rows = rows_of(Path(logger.log_dir) / "quantization_layers.csv")
    assert list(rows[0]) == ["step", *COLUMNS]
    assert sorted({int(row["step"]) for row in rows}) == steps
    head = [row for row in rows if row["layer"] == "head"]
    assert [row["weight_sqnr_db"] != "" for row in head] == [step >= 3 for step in steps]
    assert {row["mode"] for row in rows} == {"fx"}
    logged = rows_of(Path(logger.log_dir) / "metrics.csv")
    curve = [float(row["quant/least_activation_sqnr_db"]) for row in logged if row["quant/least_activation_sqnr_db"]]
    at_last = [float(row["activation_sqnr_db"]) for row in rows if row["step"] == "7" and row["activation_sqnr_db"]]
    assert curve[-1] == pytest.approx(min(at_last))


def test_steps_are_counted_by_optimizer_steps_under_accumulation(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3, "logger": logger}
    trainer(qat(), QuantizationMonitor(every_n_steps=2), **settings).fit(Lit(), loader())
    rows = rows_of(Path(logger.log_dir) / "quantization_layers.csv")
    assert [int(row["step"]) for row in rows if row["layer"] == "head"] == [0, 2, 4, 5]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_fit_measures_on(mode: str, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True)
    settings: dict[str, Any] = {"enable_checkpointing": True}
    trainer(qat(mode), QuantizationMonitor(), saving, max_epochs=1, **settings).fit(Lit(), loader())
    monitor, logger = QuantizationMonitor(every_n_steps=5), CSVLogger(tmp_path)
    trainer(qat(mode), monitor, max_epochs=2, logger=logger).fit(Lit(), loader(), ckpt_path=tmp_path / "last.ckpt")
    rows = rows_of(Path(logger.log_dir) / "quantization_layers.csv")
    assert [int(row["step"]) for row in rows if row["layer"] == "head"] == [5, 7]


@pytest.mark.parametrize("mode", MODES)
def test_wandb_gets_curves_histograms_and_a_table(mode: str, tmp_path: Path) -> None:
    logger = WandbLogger(name=mode, save_dir=str(tmp_path), offline=True, project="monitor")
    monitor = QuantizationMonitor(every_n_steps=2)
    trainer(qat(mode), monitor, logger=logger, log_every_n_steps=1).fit(Lit(), loader())
    logger.experiment.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(run)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["summary"]
    rows = {row.layer: row for row in monitor.layers}
    assert found["quant/weight_sqnr_db/head"] == pytest.approx(rows["head"].weight_sqnr_db)
    assert found["quant/activation_sqnr_db/features.0"] == pytest.approx(rows["features.0"].activation_sqnr_db)
    assert found["quant/least_weight_sqnr_db"] == pytest.approx(
        min(rows[n].weight_sqnr_db for n in ("features.0", "head"))
    )
    assert found["quant/activations/features.0"]["_type"] == "histogram"
    assert sum(found["quant/weight_integers/head"]["values"]) == 72 * 4
    table = json.loads(next(run.rglob("layers_*.table.json")).read_text())
    assert found["quant/layers"]["_type"] == "table-file"
    assert table["columns"] == list(COLUMNS)
    assert [row[0] for row in table["data"]] == list(rows)
    assert not list(tmp_path.rglob("quantization_layers.csv"))


@pytest.mark.parametrize("mode", MODES)
def test_wandb_gets_what_is_int8_before_and_after(mode: str, tmp_path: Path) -> None:
    logger = WandbLogger(name=mode, save_dir=str(tmp_path), offline=True, project="coverage")
    callback = qat(mode, exclude=["net.head"])
    trainer(callback, logger=logger, max_epochs=1).fit(Lit(), loader())
    logger.experiment.finish()
    (said,), (done,) = (
        list(tmp_path.rglob(f"{name}.table.json")) for name in ("coverage_prepared_*", "coverage_[0-9]*")
    )
    before, after = (json.loads(path.read_text())["data"] for path in (said, done))
    rows = [*callback.quantized.coverage, *callback.quantized.operations]
    assert before == after == [list(astuple(row)) for row in rows]
    assert callback.coverage == rows
    assert [row.reason for row in rows if row.name == "head"] == ["excluded"]


def test_without_a_quantized_network_it_says_so() -> None:
    monitor = QuantizationMonitor()
    with pytest.warns(UserWarning, match="QuantizationMonitor has nothing to look at"):
        trainer(monitor).fit(Lit(), loader())
    assert monitor.layers == []


class Breaks(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise RuntimeError("broken off")
        return loss


def test_a_fit_that_is_broken_off_leaves_no_hook() -> None:
    module = Breaks()
    with pytest.raises(RuntimeError, match="broken off"):
        trainer(qat(), QuantizationMonitor(every_n_steps=1)).fit(module, loader())
    assert not any(fq._forward_hooks for _, fq in fake_quantizers(module))
