"""A plain ``trainer.test`` logs which network was tested."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, evaluate_variants
from qat_lightning.compare import find_runs
from tests.callbacks.lit import Lit, loader, trainer
from tests.callbacks.test_settings_log import Kept


def logged(folder: Path) -> dict[str, str]:
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return {key: value for row in rows for key, value in row.items() if value}


def test_what_was_tested_is_logged_behind_its_name_and_is_a_run_to_compare(tmp_path: Path) -> None:
    qat, model = QuantizationAwareTraining(), Lit()
    run = trainer(qat, logger=CSVLogger(tmp_path, "", ""))
    run.fit(model, loader())
    (result,) = run.test(model, loader())
    found = logged(tmp_path)
    assert float(found["int8/test/acc"]) == pytest.approx(result["test/acc"])
    assert float(found["test/acc"]) == pytest.approx(result["test/acc"])
    assert not any(key.startswith(("int8/val", "float/", "fake_quant/")) for key in found)
    (read,) = find_runs([tmp_path])
    assert read.status == "finished"
    assert "int8/test/acc" in read.metrics


def test_without_an_int8_network_it_is_fake_quant_that_was_tested(tmp_path: Path) -> None:
    model = Lit()
    run = trainer(QuantizationAwareTraining(convert_on_fit_end=False), logger=CSVLogger(tmp_path, "", ""))
    run.fit(model, loader())
    run.test(model, loader())
    assert "fake_quant/test/acc" in logged(tmp_path)


def test_evaluate_variants_logs_each_once(tmp_path: Path) -> None:
    model = Lit()
    run = trainer(QuantizationAwareTraining(), logger=CSVLogger(tmp_path, "", ""))
    run.fit(model, loader())
    evaluate_variants(run, model, dataloaders=loader())
    assert not any(key.count("int8/") > 1 or key.startswith("test/") for key in logged(tmp_path))


class Refuses(Kept):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("int8/") for key in metrics):
            raise ValueError("no slashes")


def test_a_logger_that_refuses_costs_a_warning_and_not_the_test() -> None:
    model = Lit()
    ptq = PostTrainingQuantization(calibration_batches=1, calibration_dataloader=loader())
    with pytest.warns(UserWarning, match=r"Refuses did not accept int8/test.*no slashes"):
        (result,) = trainer(ptq, logger=Refuses()).test(model, loader())
    assert "test/acc" in result
