"""Export at the end of a real fit."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from qat_lightning import (
    PostTrainingQuantization,
    QuantizationAwareTraining,
    QuantizedModelExport,
    Scheme,
    evaluate_variants,
)
from qat_lightning.errors import CombinationError, ConfigurationError
from qat_lightning.export.run import open_artifact
from tests.callbacks.lit import Lit, loader, trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_fit_leaves_artifacts_that_are_tested_like_the_variants(tmp_path: Path) -> None:
    model, data = Lit(), loader()
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    export = QuantizedModelExport(["torchscript"], dirpath=str(tmp_path / "export"), batches=2)
    run = trainer(export, QuantizationAwareTraining("fx", "x86"), max_epochs=2, logger=logger)
    run.fit(model, data, data)
    result = export.results["torchscript"]
    assert result.passed
    assert export.fastest is result
    assert (tmp_path / "export" / "model.torchscript.pt").is_file()
    summary = evaluate_variants(run, model, dataloaders=data)
    assert summary["torchscript/test/acc"] == pytest.approx(summary["fake_quant/test/acc"], abs=0.02)
    assert summary["torchscript/latency_ms"] == result.latency_ms
    logger.experiment.finish()
    found = _read_back(tmp_path)
    assert found["torchscript/agreement"] == result.agreement
    assert found["torchscript/test/acc"] == summary["torchscript/test/acc"]


def _read_back(folder: Path) -> dict[str, Any]:
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(run)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, text=True))["summary"]
    return found


@pytest.mark.slow
def test_post_training_quantization_is_exported_as_well(tmp_path: Path) -> None:
    model, data = Lit(), loader()
    export = QuantizedModelExport(["torchscript"], dirpath=str(tmp_path), batches=1)
    trainer(PostTrainingQuantization("fx", "x86"), export, max_epochs=1).fit(model, data)
    assert export.results["torchscript"].passed


@pytest.mark.slow
def test_without_a_fit_the_first_evaluation_exports_once(tmp_path: Path) -> None:
    model, data = Lit(), loader()
    export = QuantizedModelExport(["torchscript"], dirpath=str(tmp_path / "export"), batches=1)
    run = trainer(PostTrainingQuantization("fx", "x86", calibration_dataloader=data), export)
    summary = evaluate_variants(run, model, dataloaders=data)
    result = export.results["torchscript"]
    assert result.passed
    assert summary["torchscript/test/acc"] == pytest.approx(summary["int8/test/acc"], abs=0.02)
    run.test(model, data, verbose=False)
    assert export.results["torchscript"] is result


@pytest.mark.nightly
@pytest.mark.parametrize(
    "partner", [QuantizationAwareTraining, partial(PostTrainingQuantization, calibration_dataloader=loader())]
)
def test_the_files_hold_the_weights_that_were_tested(partner: Any, tmp_path: Path) -> None:
    """Files of the fit, then of an earlier checkpoint, also in the comparison of variants."""
    model, data = Lit(), loader()
    export = QuantizedModelExport(["torchscript"], dirpath=str(tmp_path / "export"), batches=1)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    callback = partner("fx", "x86")
    run = trainer(callback, export, saving, max_epochs=3, enable_checkpointing=True)
    run.fit(model, data, data)
    of_fit = export.results["torchscript"]
    assert of_fit.source == callback.quantized.source == "the fit that ended at step 12"
    run.validate(model, data, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert export.results["torchscript"] is of_fit
    run.test(model, data, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    result = export.results["torchscript"]
    assert "epoch=0.ckpt" in result.source
    assert json.loads((tmp_path / "export" / "export.json").read_text())["results"][0]["source"] == result.source
    summary = evaluate_variants(run, model, dataloaders=data)
    assert summary["torchscript/test/loss"] == pytest.approx(summary["int8/test/loss"], rel=1e-4)
    assert export.results["torchscript"] is result
    images = next(iter(data))[0]
    with open_artifact(result) as network, torch.no_grad():
        assert torch.allclose(network(images), callback.quantized(images), atol=1e-5)


@pytest.mark.parametrize(
    ("partner", "formats", "why"),
    [
        (QuantizationAwareTraining("fx", "x86"), ["executorch"], "int8 activations"),
        (QuantizationAwareTraining("pt2e", "x86"), ["torchscript"], "mode='fx'"),
        (QuantizationAwareTraining("fx", "x86", kind="dynamic"), ["tflite"], "static ranges"),
        (QuantizationAwareTraining("fx", "x86", convert_on_fit_end=False), ["pt2"], "convert_on_fit_end"),
        (QuantizationAwareTraining("fx", "x86", scheme=Scheme(activation_bits=4)), ["pt2"], "there is none"),
        (QuantizationAwareTraining("auto", "x86"), ["executorch"], "int8 activations"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_a_step(partner: Any, formats: list[str], why: str) -> None:
    run = trainer(partner, QuantizedModelExport(formats), max_epochs=1)
    with pytest.raises(CombinationError, match=why):
        run.fit(Lit(), loader())
    assert run.global_step == 0


@pytest.mark.parametrize("settings", [{"formats": ["exe"]}, {"formats": []}, {"batches": 0}, {"min_agreement": 2}])
def test_settings_are_checked_at_construction(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        QuantizedModelExport(**settings)


def test_it_goes_with_a_quantization_callback() -> None:
    with pytest.raises(ConfigurationError, match="needs exactly one QuantizationAwareTraining"):
        trainer(QuantizedModelExport(), max_epochs=1).fit(Lit(), loader())


@pytest.mark.nightly
def test_of_two_processes_the_first_exports(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.callbacks.ddp_export", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "rank 0 [True] True" in done.stdout
    assert "rank 1 [] True" in done.stdout + done.stderr
    assert (tmp_path / "model.torchscript.pt").is_file()
