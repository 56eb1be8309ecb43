"""Testing every variant, and where results are logged, with a callback that only selects the variant."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qat_lightning.run.evaluate import evaluate_variants, variants_table


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.scale = 1.0
        self.fail = False

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.fail:
            raise RuntimeError("no")
        self.net(batch)
        self.log("test/acc", self.scale)


class Variants(Callback):
    """Scales the logged metric by the variant."""

    variants = ("float", "fake_quant", "int8")
    chosen_variant = None

    def __init__(self, model: Model) -> None:
        self.model = model
        self.used: list[str | None] = []
        self.fidelity: dict[str, float] = {}
        self.example_inputs_ = ((torch.zeros(8, 4),), {})

    def use_variant(self, name: str | None) -> None:
        self.used.append(name)
        self.model.scale = {"float": 0.5, "fake_quant": 0.25, "int8": 0.125}.get(name or "", 1.0)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.used[-1] == "int8":
            self.fidelity = {"agreement": 1.0, "sqnr_db": 60.0}

    def network(self, name: str) -> nn.Module:
        return nn.Linear(4, 1000 if name == "float" else 100)


DATA = DataLoader(torch.zeros(8, 4), batch_size=4)  # type: ignore[arg-type]
EXPECTED = {
    *(f"{name}/test/acc" for name in Variants.variants),
    *(f"{name}/{measure}" for name in ("float", "int8") for measure in ("size_mb", "latency_ms")),
    *("size_ratio", "speedup", "latency_spread", "int8/agreement", "int8/sqnr_db"),
}


def evaluate(loggers: list[Logger], **change: Any) -> tuple[dict[str, float], Variants]:
    model = Model()
    callback = Variants(model)
    vars(model).update(change)
    trainer = Trainer(
        accelerator="cpu",
        logger=loggers,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    return evaluate_variants(trainer, model, dataloaders=DATA), callback


def test_every_variant_is_tested_under_its_name_and_the_choice_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    summary, callback = evaluate([])
    assert summary.keys() == EXPECTED
    assert (summary["float/test/acc"], summary["int8/test/acc"]) == (0.5, 0.125)
    assert summary["size_ratio"] == summary["float/size_mb"] / summary["int8/size_mb"] > 5
    assert callback.used == ["float", None, "fake_quant", None, "int8", None]
    shown = capsys.readouterr().out
    for word in ("fake_quant", "test/acc", "0.1250", "speed-up", "100.00%", "60.0 dB"):
        assert word in shown


def test_the_choice_is_put_back_when_a_test_fails(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    with pytest.raises(RuntimeError, match="no"):
        evaluate([logger], fail=True)
    assert "log_metrics" not in vars(logger)


def test_loggers_get_no_metric_without_the_name_of_a_variant(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    summary, _ = evaluate([logger])
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}
    assert {"test/acc", "step", "epoch"} & logged.keys() == {"step", "epoch"}
    assert {key: logged[key] for key in summary} == pytest.approx(summary)


def test_wandb_gets_the_summary(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    summary, _ = evaluate([logger])
    kept = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert {key: kept[key] for key in summary} == pytest.approx(summary)
    assert "test/acc" not in kept


def test_a_run_without_quantization_is_float_alone() -> None:
    model = Model()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    summary = evaluate_variants(trainer, model, dataloaders=DATA)
    assert summary.keys() == {"float/test/acc", "float/size_mb", "float/latency_ms", "latency_spread"}
    assert not model.net._forward_pre_hooks


def test_a_float_run_whose_network_is_not_clear_is_tested_and_not_measured() -> None:
    model = Model()
    model.other = nn.Linear(2, 2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    assert evaluate_variants(trainer, model, dataloaders=DATA).keys() == {"float/test/acc"}


def test_the_table_has_a_row_for_each_variant_also_for_metrics_without_a_slash() -> None:
    table = variants_table({"float/accuracy": 0.9, "int8/accuracy": 0.8, "int8/size_mb": 1.0})
    assert [column.header for column in table.columns][:2] == ["variant", "accuracy"]
    assert table.row_count == 2


class Folds(Model):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_a_float_run_also_measures_the_fused_network(capsys: pytest.CaptureFixture[str]) -> None:
    model, trainer = Folds(), Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    network = model.net
    summary = evaluate_variants(trainer, model, dataloaders=DATA, fused=True)
    assert summary["fused/chains"] == 1
    assert summary["fused/test/acc"] == summary["float/test/acc"]
    assert summary["fused/size_mb"] < summary["float/size_mb"]
    assert summary["fused/speedup"] == pytest.approx(summary["float/latency_ms"] / summary["fused/latency_ms"])
    assert model.net is network
    assert "BatchNorm folded into 1 layers" in capsys.readouterr().out


def test_what_cannot_be_fused_does_not_cost_the_results() -> None:
    model, trainer = Folds(), Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    model.other = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="There is no fused variant"):
        summary = evaluate_variants(trainer, model, dataloaders=DATA, fused=True)
    assert "float/test/acc" in summary
