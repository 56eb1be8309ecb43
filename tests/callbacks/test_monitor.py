"""QuantizationMonitor with a real Trainer: what loggers get, and that the fit is unaffected."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from qat_lightning import AdaRound, PostTrainingQuantization, QuantizationMonitor, Scheme
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.measure.monitoring import COLUMNS
from qat_lightning.modes.prepared import fake_quantizers
from tests.callbacks.lit import MODES, Lit, assert_same_state, loader, qat, state, trainer
from tests.callbacks.test_calibration_source import NoValidation, Two
from tests.callbacks.test_insert import OwnForward
from tests.callbacks.test_post_training import Data


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
@pytest.mark.slow
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


def kept_by_wandb(logger: WandbLogger, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the offline run, and its summary."""
    logger.experiment.finish()
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(run)]
    return run, json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["summary"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_wandb_gets_curves_histograms_and_a_table(mode: str, tmp_path: Path) -> None:
    logger = WandbLogger(name=mode, save_dir=str(tmp_path), offline=True, project="monitor")
    monitor = QuantizationMonitor(every_n_steps=2)
    trainer(qat(mode), monitor, logger=logger, log_every_n_steps=1).fit(Lit(), loader())
    run, found = kept_by_wandb(logger, tmp_path)
    rows = {row.layer: row for row in monitor.layers}
    for curve in ("scale", "zero_point", "low", "high", "clipped_share"):
        assert found[f"quant/{curve}/features.0"] == pytest.approx(getattr(rows["features.0"], curve)), curve
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
    logged = [replace(row, name=f"net.{row.name}") for row in rows]
    assert before == after == [list(astuple(row)) for row in logged]
    assert callback.coverage == logged  # as exclude takes them
    assert [row.reason for row in rows if row.name == "head"] == ["excluded"]


def test_any_figure_of_weights_can_be_a_curve(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=str(tmp_path), offline=True, project="monitor")
    curves = ["weight_gradient_cut_share", "weight_scale_min", "weight_scale_max", "weight_low", "weight_high"]
    monitor = QuantizationMonitor(curves=curves, histograms=False)
    trainer(qat(scheme=Scheme(weight_bits=3)), monitor, logger=logger).fit(Lit(), loader())
    _, found = kept_by_wandb(logger, tmp_path)
    (row,) = (row for row in monitor.layers if row.layer == "head")
    for curve in curves:
        assert found[f"quant/{curve}/head"] == pytest.approx(getattr(row, curve)), curve
    assert found["quant/most_weight_gradient_cut_share"] >= row.weight_gradient_cut_share > 0
    assert "quant/scale/head" not in found


class Elsewhere(Logger):
    """A custom logger with a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.logged = folder, list[dict[str, float]]()

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        return "elsewhere"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append(metrics)


class Alone(Callback):
    """From the first step on, collective operations raise an error."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.patch.setattr(type(trainer), "log_dir", property(lambda _: pytest.fail("log_dir")))


def test_another_logger_is_served_by_the_first_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Elsewhere(tmp_path)
    trainer(qat(), QuantizationMonitor(), Alone(monkeypatch), logger=logger).fit(Lit(), loader())
    assert any("quant/least_weight_sqnr_db" in metrics for metrics in logger.logged)
    assert {row["step"] for row in rows_of(tmp_path / "quantization_layers.csv")} == {"0", "7"}


def complaints(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "QuantizationMonitor" in str(warning.message)]


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("mode", MODES)
def test_what_a_fit_calibrates_is_measured_at_its_end(mode: str, first: bool, tmp_path: Path) -> None:
    """At any position in the list of callbacks, the fit and later stages are unaffected."""
    ended, results = [], []
    for more in ([], [QuantizationMonitor(every_n_steps=2)]):
        torch.manual_seed(0)
        module, ptq, logger = Lit(), PostTrainingQuantization(mode=mode), CSVLogger(tmp_path)
        run = trainer(*([*more, ptq] if first else [ptq, *more]), logger=logger)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(module, loader(shuffle=True))
            drawn = torch.rand(1)
            results.append(run.test(module, loader(), verbose=False))
        ended.append(state(module) | {"drawn": drawn})
        assert not complaints(caught)
    assert_same_state(*ended)
    assert results[0] == results[1]
    rows = rows_of(Path(logger.log_dir) / "quantization_layers.csv")
    assert {row["step"] for row in rows} == {"8"}
    by_layer = {row["layer"]: row for row in rows}
    assert len(by_layer) == len(rows), "the test measured nothing again"
    assert float(by_layer["features.0"]["weight_sqnr_db"]) > 30
    assert float(by_layer["features.0"]["activation_sqnr_db"]) > 20
    assert float(by_layer["head"]["weight_scale_max"]) > float(by_layer["head"]["weight_scale_min"]) > 0
    assert {row[name] for row in rows for name in ("gradient_cut_share", "weight_gradient_cut_share")} == {""}
    logged = rows_of(Path(logger.log_dir) / "metrics.csv")
    least = [float(row["quant/least_weight_sqnr_db"]) for row in logged if row["quant/least_weight_sqnr_db"]]
    assert least == [min(float(row["weight_sqnr_db"]) for row in rows if row["weight_sqnr_db"])]
    assert not any(fq._forward_hooks for _, fq in fake_quantizers(ptq.prepared))


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("make", [Lit, OwnForward])
@pytest.mark.slow
def test_what_is_calibrated_without_a_fit_is_measured_once(
    make: type[Lit], stage: str, first: bool, tmp_path: Path
) -> None:
    results = []
    for more in ([], [QuantizationMonitor()]):
        torch.manual_seed(0)
        module, ptq, logger = make(), PostTrainingQuantization(calibration_dataloader=loader()), CSVLogger(tmp_path)
        run = trainer(*([*more, ptq] if first else [ptq, *more]), logger=logger)
        before = state(module)
        for _ in range(2):
            given = {} if stage == "predict" else {"verbose": False}
            results.append(getattr(run, stage)(module, loader(), **given))
        assert_same_state(before, state(module))
    (monitor,) = more
    for result in results[1:]:
        assert str(result) == str(results[0])
    rows = rows_of(Path(logger.log_dir) / "quantization_layers.csv")
    assert {row["step"] for row in rows} == {"0"}
    assert [row["layer"] for row in rows] == [row.layer for row in monitor.layers]
    assert sum(row["weight_sqnr_db"] != "" for row in rows) == 2
    with torch.no_grad():
        next(module.parameters()).mul_(1.5)
    getattr(run, stage)(module, loader(), **given)
    assert len(rows_of(Path(logger.log_dir) / "quantization_layers.csv")) == 2 * len(rows), "other weights"


def test_a_second_fit_is_measured_by_its_own_calibration(tmp_path: Path) -> None:
    ptq, module = PostTrainingQuantization(), Lit()
    trainer(ptq).fit(module, loader())
    for first in (True, False):
        monitor, logger = QuantizationMonitor(), CSVLogger(tmp_path)
        trainer(*([monitor, ptq] if first else [ptq, monitor]), logger=logger, max_epochs=1).fit(module, loader())
        scales = {row["layer"]: row["scale"] for row in rows_of(Path(logger.log_dir) / "quantization_layers.csv")}
        present = {float(fq.calculate_qparams()[0]) for _, fq in fake_quantizers(ptq.prepared) if fq.observed}
        assert {float(scale) for scale in scales.values() if scale} <= present


class CountsSetups(Data):
    setups = 0

    def setup(self, stage: str) -> None:
        self.setups += 1
        super().setup(stage)


def test_the_training_data_of_a_datamodule_is_looked_at_without_setting_it_up_again() -> None:
    counts = []
    for more in ([], [QuantizationMonitor()]):
        data = CountsSetups()
        trainer(PostTrainingQuantization(), *more).test(Lit(), datamodule=data, verbose=False)
        counts.append(data.setups)
    assert counts[0] == counts[1]
    assert more[0].layers


def test_wandb_gets_what_was_calibrated(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=str(tmp_path), offline=True, project="monitor")
    monitor, ptq = QuantizationMonitor(), PostTrainingQuantization(adaround=AdaRound(iterations=20))
    trainer(ptq, monitor, logger=logger).fit(Lit(), loader())
    run, found = kept_by_wandb(logger, tmp_path)
    (row,) = (row for row in monitor.layers if row.layer == "features.0")
    assert found["quant/scale/features.0"] == pytest.approx(row.scale)
    assert found["quant/activations/features.0"]["_type"] == "histogram"
    assert sum(found["quant/weight_integers/head"]["values"]) == 72 * 4
    (table,) = run.rglob("layers_*.table.json")
    assert [line[0] for line in json.loads(table.read_text())["data"]] == [row.layer for row in monitor.layers]


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
def test_of_kinds_without_fake_quant_it_says_so_once(kind: str) -> None:
    monitor = QuantizationMonitor()
    run = trainer(PostTrainingQuantization(kind=kind), monitor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = Lit()
        run.fit(module, loader())
        run.test(module, loader(), verbose=False)
    (said,) = complaints(caught)
    assert f"kind={kind!r} makes the int8 network without fake-quant" in said
    assert monitor.layers == []


def test_data_that_can_be_gone_through_only_once_is_said_to_be() -> None:
    monitor = QuantizationMonitor()
    ptq = PostTrainingQuantization(calibration_dataloader=iter(list(loader())))
    with pytest.warns(UserWarning, match="could not be read a second time"):
        trainer(ptq, monitor).test(Lit(), loader(), verbose=False)
    assert monitor.layers == []


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("method", ["fit", "test"])
def test_of_a_calibration_with_calls_the_first_is_measured(method: str, first: bool) -> None:
    """No step of the module can be used, and a test has no training data."""
    module, monitor = NoValidation(), QuantizationMonitor()
    ptq = PostTrainingQuantization(calls=[batch[0] for batch in loader()])
    run = trainer(*([monitor, ptq] if first else [ptq, monitor]), max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(run, method)(module, loader())
    assert not complaints(caught)
    assert ptq.quantized is not None
    measured = {row.layer: row for row in monitor.layers}
    assert measured["features.0"].activation_sqnr_db > 20
    assert measured["head"].weight_sqnr_db > 30
    assert not any(fq._forward_hooks for _, fq in fake_quantizers(ptq.prepared))


def test_of_a_calibration_with_calls_of_several_networks_the_first_of_each_is_measured() -> None:
    monitor, call = QuantizationMonitor(), Example((torch.randn(8, 64),))
    calls = {"net": [call], "other": [{"input": torch.randn(8, 3)}]}
    trainer(PostTrainingQuantization(module=["net", "other"], calls=calls), monitor).test(Two(), loader())
    assert {row.layer.partition(".")[0] for row in monitor.layers if row.weight_sqnr_db} == {"net", "other"}


def test_calls_that_can_be_gone_through_only_once_are_said_to_be() -> None:
    monitor, ptq = QuantizationMonitor(), PostTrainingQuantization(calls=iter([batch[0] for batch in loader()]))
    with pytest.warns(UserWarning, match="could not be read a second time"):
        trainer(ptq, monitor, max_epochs=1).fit(NoValidation(), loader())
    assert monitor.layers == []
    assert ptq.quantized is not None


class SpoiledLater:
    """Gives the batches of a loader once, and something else afterwards."""

    def __init__(self) -> None:
        self.spoiled = False

    def __iter__(self) -> Any:
        yield from [torch.zeros(3)] if self.spoiled else loader()
        self.spoiled = True


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("method", ["fit", "test"])
def test_what_cannot_be_measured_costs_no_int8_network(method: str, first: bool) -> None:
    monitor, ptq = QuantizationMonitor(), PostTrainingQuantization(calibration_dataloader=SpoiledLater())
    run = trainer(*([monitor, ptq] if first else [ptq, monitor]), max_epochs=1)
    with pytest.warns(UserWarning, match="QuantizationMonitor measured nothing.*training_step failed"):
        getattr(run, method)(Lit(), loader())
    assert monitor.layers == []
    assert ptq.quantized is not None
    assert not any(fq._forward_hooks for _, fq in fake_quantizers(ptq.prepared))


def test_without_a_quantized_network_it_says_so() -> None:
    monitor = QuantizationMonitor()
    with pytest.warns(UserWarning, match="QuantizationMonitor has nothing to measure"):
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
