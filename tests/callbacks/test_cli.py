"""LightningCLI: every argument of the callback on the command line and in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonargparse")

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from qat_lightning import QuantizationAwareTraining, Scheme
from qat_lightning.settings.schedule import SchedulePoint
from tests.callbacks.lit import Lit, loader

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


class Model(Lit):
    """A model as a CLI creates it, without a network argument."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr=lr)


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()

    def test_dataloader(self) -> Any:
        return loader()


def cli(args: list[str], run: bool = True) -> Any:
    return LightningCLI(Model, Data, args=args, run=run, save_config_callback=None)


def callback_of(made: Any) -> QuantizationAwareTraining:
    (found,) = [c for c in made.trainer.callbacks if isinstance(c, QuantizationAwareTraining)]
    return found


def test_from_the_command_line() -> None:
    made = cli(
        [
            "fit",
            *QUIET,
            "--trainer.callbacks+=qat_lightning.QuantizationAwareTraining",
            "--trainer.callbacks.mode=eager",
            "--trainer.callbacks.backend=onednn",
            "--trainer.callbacks.start={step: 3}",
            "--trainer.callbacks.freeze_observers=0.75",
            "--trainer.callbacks.freeze_batchnorm=1",
            "--trainer.callbacks.exclude=[net.head]",
            "--trainer.callbacks.module=net",
            "--trainer.callbacks.scheme.weight_bits=4",
            "--trainer.callbacks.reset_best_on_start=true",
        ]
    )
    callback = callback_of(made)
    assert callback.schedule.start == SchedulePoint("step", 3)
    assert callback.schedule.freeze_observers == SchedulePoint("fraction", 0.75)
    assert callback.schedule.freeze_batchnorm == SchedulePoint("epoch", 1)
    assert callback.scheme == Scheme(weight_bits=4)
    assert callback.exclude == ("net.head",)
    assert callback.reset_best_on_start
    assert callback.quantized.recipe.backend == "onednn"
    made.trainer.test(made.model, made.datamodule, verbose=False)
    assert callback.fidelity["agreement"] > 0.9


CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: qat_lightning.QuantizationAwareTraining
      init_args:
        mode: fx
        backend: x86
        module: [net.features, net.head]
        example_inputs: null
        scheme: {weight_granularity: per_tensor, averaging_constant: 0.1}
        start: {fraction: 0.25}
        freeze_observers: {epoch: 1}
        freeze_batchnorm: null
        include: ["net.*"]
        exclude: null
        convert_on_fit_end: false
        float_checkpoint: null
        reset_best_on_start: false
        observe_stages: [train, validate]
model: {lr: 0.01}
"""


def test_from_yaml_and_back(tmp_path: Path) -> None:
    """Every argument; the config that the CLI prints creates the same callback."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    made = cli([f"--config={tmp_path / 'config.yaml'}"], run=False)
    (tmp_path / "again.yaml").write_text(made.parser.dump(made.config))
    for callback in (callback_of(made), callback_of(cli([f"--config={tmp_path / 'again.yaml'}"], run=False))):
        assert callback.module == ["net.features", "net.head"]
        assert callback.scheme == Scheme(weight_granularity="per_tensor", averaging_constant=0.1)
        assert callback.schedule.start == SchedulePoint("fraction", 0.25)
        assert callback.schedule.freeze_observers == SchedulePoint("epoch", 1)
        assert callback.schedule.freeze_batchnorm is None
        assert callback.include == ("net.*",)
        assert not callback.convert_on_fit_end
        assert callback.observe_stages == ("train", "validate")


@pytest.mark.parametrize("wrong", ["start=yesterday", "mode=[1]", "scheme.weight_bits=99", "nonsense=1"])
def test_what_is_no_setting_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        cli(["--trainer.callbacks+=qat_lightning.QuantizationAwareTraining", f"--trainer.callbacks.{wrong}"], run=False)
    assert wrong.split("=")[0].split(".")[-1] in f"{capsys.readouterr().err} {caught.value}"
