"""The callback logs its settings to every logger."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from torch import nn

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, Scheme
from qat_lightning.callbacks.distillation import Distillation
from qat_lightning.callbacks.parts.settings_log import settings_of_callback
from tests.callbacks.lit import Lit, Net, loader, trainer

WRITERS = [name for name in ("tensorboard", "tensorboardX") if importlib.util.find_spec(name)]


class Kept(Logger):
    """Records the last value under each name, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.params: dict[str, Any] = {}
        self.calls: list[dict[str, Any]] = []
        self.error = error

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if self.error is not None and "quantization/mode" in params:
            raise self.error
        self.calls.append(dict(params))
        self.params |= params

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...


def hparams(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "hparams.yaml").read_text())
    return found


def test_every_logger_gets_settings_mode_and_schedule_beside_its_own(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, "one", ""), CSVLogger(tmp_path, "two", ""), Kept()]
    qat = QuantizationAwareTraining(
        "auto", start={"epoch": 1}, freeze_observers=0.7, exclude=["net.head"], scheme=Scheme(weight_bits=4)
    )
    trainer(qat, Distillation(temperature=2.0), logger=loggers).fit(Lit(), loader())
    for found in (hparams(tmp_path / "one"), hparams(tmp_path / "two"), loggers[2].params):
        assert found["lr"] == Lit().hparams["lr"]
        assert found["quantization/method"] == "QuantizationAwareTraining"
        assert found["quantization/mode"] == "auto"
        assert found["quantization/chosen_mode"] == qat.prepared._quantization.recipe.mode
        assert found["quantization/backend"] == "x86"
        assert (found["quantization/start"], found["quantization/freeze_observers"]) == ("{epoch: 1}", 0.7)
        assert found["quantization/freeze_batchnorm"] is None
        assert found["quantization/exclude"] == "net.head"
        assert found["quantization/scheme.weight_bits"] == 4
        assert found["quantization/Distillation/temperature"] == 2.0
        assert not any("example_inputs" in key for key in found)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("fits", [True, False])
def test_quantization_without_training_says_so_too(kind: Any, fits: bool) -> None:
    logger = Kept()
    ptq = PostTrainingQuantization("auto", kind=kind, calibration_batches=2, calibration_dataloader=loader())
    run = trainer(ptq, logger=logger)
    (run.fit if fits else run.test)(Lit(), loader())
    assert logger.params["quantization/kind"] == kind
    assert logger.params["quantization/chosen_mode"] in ("fx", "pt2e", "eager")
    assert sum("quantization/kind" in call for call in logger.calls) == 1


def test_the_last_word_is_the_module_own() -> None:
    """A logger that keeps only the last call keeps its earlier values."""
    logger = Kept()
    trainer(QuantizationAwareTraining(), logger=logger).fit(Lit(), loader())
    assert "lr" in logger.calls[-1]
    assert "quantization/mode" not in logger.calls[-1]


def test_a_logger_that_refuses_costs_a_warning_and_no_training() -> None:
    loggers = [Kept(ValueError("no slashes")), Kept()]
    qat = QuantizationAwareTraining()
    with pytest.warns(UserWarning, match=r"Kept did not accept the settings .*ValueError: no slashes"):
        trainer(qat, logger=loggers).fit(Lit(), loader())
    assert qat.quantized is not None
    assert loggers[1].params["quantization/mode"] == "fx"


@pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")),
    reason="there is no TensorBoard",
)
def test_tensorboard_shows_both_what_the_module_and_what_the_callback_is_set_to(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    trainer(QuantizationAwareTraining(), logger=logger).fit(Lit(), loader())
    found = hparams(tmp_path)
    assert (found["lr"], found["quantization/mode"]) == (Lit().hparams["lr"], "fx")


class Mine(QuantizationAwareTraining):
    def __init__(self, *args: Any, extra: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = extra


def test_a_subclass_that_passes_on_its_arguments() -> None:
    found = settings_of_callback(Mine("pt2e", example_inputs=object, module=["a", "b"], extra=Net()))
    assert found["quantization/mode"] == "pt2e"
    assert found["quantization/extra"] == "Net"
    assert found["quantization/module"] == "a, b"
    assert all(value is None or isinstance(value, bool | int | float | str) for value in found.values())
