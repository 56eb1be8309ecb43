"""Export at the end of a real fit."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader, IterableDataset

from qat_lightning import (
    PostTrainingQuantization,
    QuantizationAwareTraining,
    QuantizedModelExport,
    Scheme,
    evaluate_variants,
)
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks import quantized_model_export
from qat_lightning.errors import CombinationError, ConfigurationError
from qat_lightning.export.run import open_artifact
from qat_lightning.modes.registry import get_mode
from tests.callbacks.lit import Lit, dataset, loader, state, trainer
from tests.callbacks.test_calibration_source import Indexed

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


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be exported, without the time that it takes: the network, and the batches to compare on."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(
        quantized_model_export,
        "export_quantized",
        lambda network, *args, **settings: found.append({"network": network, **settings}) or [],
    )
    return found


class Endless(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Any:
        return iter(dataset())


def endless() -> DataLoader[Any]:
    return DataLoader(Endless(), batch_size=16)


@pytest.mark.parametrize(
    ("settings", "validation", "sizes"),
    [
        ({}, lambda: None, [16, 16, 16]),
        ({}, list, [16, 16, 16]),
        ({}, endless, [16, 16, 16]),
        ({"dataloader": endless()}, lambda: loader(7, batch_size=7), [16, 16, 16]),
        ({"dataloader": []}, lambda: loader(7, batch_size=7), [7]),
        ({}, lambda: [loader(7, batch_size=7), loader(5, batch_size=5)], [7, 5]),
        ({}, lambda: {"a": endless(), "b": loader(7, batch_size=7)}, [16, 16, 16]),
    ],
    ids=["none", "no_list", "endless", "given_endless", "given_none", "two", "endless_of_two"],
)
def test_artifacts_are_compared_on_batches_of_any_loaders(
    settings: dict[str, Any], validation: Callable[[], Any], sizes: list[int], exported: list[dict[str, Any]]
) -> None:
    class Both(Lit):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    export = QuantizedModelExport(["torchscript"], batches=3, **settings)
    run = trainer(export, QuantizationAwareTraining("fx", "x86", rehearse=False), max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Both(), loader(), validation())
    assert not [warning for warning in caught if "example inputs only" in str(warning.message)]
    (made,) = exported
    assert [len(call.args[0]) for call in made["batches"]] == sizes
    assert [len(labels) for _, labels in made["data"]] == sizes


def test_a_validation_step_gets_the_index_of_the_loader_in_the_comparison(exported: list[dict[str, Any]]) -> None:
    seen: list[tuple[int, int]] = []
    module = Indexed(seen.append)
    run = trainer(QuantizedModelExport(), PostTrainingQuantization("fx", "x86", rehearse=False), max_epochs=1)
    run.fit(module, loader(), [loader(7, batch_size=7), loader(5, batch_size=5)])
    assert seen[-4:] == [(7, 0), (5, 1)] * 2, "in the calibration, then in the comparison"
    assert len(exported[0]["batches"]) == 2


def _new_weights(run: Any, model: Lit, partner: Any, folder: Path) -> None:
    torch.manual_seed(1)
    model.load_state_dict(state(Lit()))
    run.test(model, loader(), verbose=False)


def _more_training(run: Any, model: Lit, partner: Any, folder: Path) -> None:
    path = folder / "last.ckpt"
    run.save_checkpoint(path)
    run.test(model, loader(), ckpt_path=path, verbose=False)
    trained = trainer(QuantizationAwareTraining("fx", "x86", rehearse=False), max_epochs=3)
    trained.fit(Lit(), loader(), ckpt_path=path)
    trained.save_checkpoint(path)
    run.test(model, loader(), ckpt_path=path, verbose=False)


def _fewer_layers(run: Any, model: Lit, partner: Any, folder: Path) -> None:
    partner.convert(exclude=["net.head"])
    run.test(model, loader(), verbose=False)


@pytest.mark.parametrize(
    ("partner", "first", "change"),
    [
        (partial(PostTrainingQuantization, calibration_dataloader=loader()), "test", _new_weights),
        (partial(PostTrainingQuantization, calibration_dataloader=loader()), "test", _fewer_layers),
        (QuantizationAwareTraining, "fit", _fewer_layers),
        (QuantizationAwareTraining, "fit", _more_training),
    ],
    ids=["ptq-weights", "ptq-layers", "qat-layers", "qat-checkpoint"],
)
def test_what_is_converted_again_is_exported_again_whatever_describes_its_weights(
    partner: Any, first: str, change: Callable[..., None], tmp_path: Path, exported: list[dict[str, Any]]
) -> None:
    model, callback = Lit(), partner("fx", "x86", rehearse=False)
    run = trainer(callback, QuantizedModelExport(dirpath=str(tmp_path)))
    getattr(run, first)(model, loader())
    run.test(model, loader(), verbose=False)
    assert len(exported) == 1, "nothing was converted again"
    change(run, model, callback, tmp_path)
    assert exported[-1]["network"] is callback.quantized
    images = next(iter(loader()))[0]
    before, last = (made["network"](images) for made in exported[-2:])
    assert not torch.equal(before, last)
    run.test(model, loader(), verbose=False)
    assert exported[-1]["network"] is callback.quantized


def test_the_network_of_another_callback_is_exported_again(exported: list[dict[str, Any]]) -> None:
    export = QuantizedModelExport()
    for _ in range(2):
        callback = PostTrainingQuantization("fx", "x86", rehearse=False, calibration_dataloader=loader())
        trainer(callback, export).test(Lit(), loader(), verbose=False)
        assert exported[-1]["network"] is callback.quantized


def test_a_fit_without_a_step_exports_what_its_checkpoint_holds(tmp_path: Path, exported: list[dict[str, Any]]) -> None:
    run = trainer(QuantizationAwareTraining("fx", "x86", rehearse=False), max_epochs=1)
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    callback = QuantizationAwareTraining("fx", "x86", rehearse=False)
    trainer(callback, QuantizedModelExport(), max_epochs=1).fit(Lit(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert isinstance(exported[0]["network"], QuantizedNetwork)


def test_why_nothing_is_exported_is_the_reason_why_there_is_no_int8_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_mode("fx")), "convert", lambda *args: 1 / 0)
    run = trainer(QuantizedModelExport(), QuantizationAwareTraining("fx", "x86", rehearse=False), max_epochs=1)
    with pytest.warns(UserWarning, match="Nothing is exported, because there is no int8 network: ZeroDivisionError"):
        run.fit(Lit(), loader())
    run = trainer(QuantizedModelExport(), QuantizationAwareTraining("fx", "x86", rehearse=False), max_epochs=0)
    with pytest.warns(UserWarning, match="Nothing is exported, because there is no int8 network: no range"):
        run.fit(Lit(), loader())


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
