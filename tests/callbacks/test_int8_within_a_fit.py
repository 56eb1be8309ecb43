"""The int8 network is there in the hooks at the end of a fit, where users save it, and earlier where it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from torch._dynamo.testing import CompileCounterWithBackend

from qat_lightning import PostTrainingQuantization, load_quantized
from qat_lightning.errors import ConversionError
from qat_lightning.modes import compiling
from tests.callbacks.lit import MODES, Lit, assert_same_state, dataset, loader, qat, state, trainer

IMAGES = dataset()[:32][0]


class Saves(Lit):
    """Saves the int8 network in its own hook."""

    def save(self) -> None:
        """Set by the test."""

    def on_train_end(self) -> None:
        self.save()


@pytest.mark.parametrize("where", ["on_train_end", "on_fit_end", "module"])
@pytest.mark.parametrize("mode", MODES)
def test_it_is_saved_in_hooks_before_those_of_the_callback(mode: str, where: str, tmp_path: Path) -> None:
    callback, module, numbers = qat(mode), Saves(), []

    def save(*_: Any) -> None:
        callback.save(tmp_path / "net.int8")
        numbers.append(callback.conversion)

    if where == "module":
        module.save = save  # type: ignore[method-assign]
    earlier = [] if where == "module" else [LambdaCallback(**{where: save})]
    run = trainer(*earlier, callback, max_epochs=1)
    run.fit(module, loader())
    saved = load_quantized(tmp_path / "net.int8", Lit().net if mode == "eager" else None)
    assert torch.equal(saved(IMAGES), callback.quantized(IMAGES))
    assert numbers == [callback.conversion], "it was not converted a second time"
    assert callback.quantized.source == f"the fit that ended at step {run.global_step}"


def test_weights_that_change_after_it_was_saved_are_converted_again(tmp_path: Path) -> None:
    callback, module = qat(), Lit()
    first: list[Any] = []

    def halve(*_: Any) -> None:
        first.append(callback.quantized)
        with torch.no_grad():
            module.net.head.weight.mul_(0.5)

    run = trainer(LambdaCallback(on_train_end=halve), callback, max_epochs=1)
    run.fit(module, loader())
    second = callback.quantized
    assert not torch.equal(second(IMAGES), first[0](IMAGES))
    assert second.source == f"the fit that ended at step {run.global_step}"


class Reads(Callback):
    """Reads the int8 network twice after each batch."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        network = self.callback.quantized
        assert network is self.callback.quantized, "converted once per step"
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_reading_it_while_training_changes_no_training(
    mode: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", CompileCounterWithBackend("aot_eager"))
    ended = []
    for read in (False, True):
        torch.manual_seed(0)
        module, callback = Lit(), qat(mode, start={"step": 1}, compile=compiled)
        reads = Reads(callback)
        trainer(callback, *([reads] if read else []), max_epochs=1, limit_train_batches=3).fit(module, loader())
        assert reads.steps == ([1, 2, 3] if read else [])
        ended.append(state(module) | {"int8": callback.quantized(IMAGES)})
    assert_same_state(*ended)


def test_there_is_none_before_the_first_step_and_the_message_says_from_when_on() -> None:
    callback, said = qat(), []

    def save(*_: Any) -> None:
        assert callback.quantized is None
        with pytest.raises(ConversionError) as caught:
            callback.save("never.int8")
        said.append(str(caught.value))

    trainer(LambdaCallback(on_train_start=save), callback, max_epochs=1).fit(Lit(), loader())
    assert said[0].endswith("A running fit has one after its first training step.")
    assert "call convert()" not in said[0]


def test_without_conversion_at_the_end_there_is_none_within_the_fit_either() -> None:
    callback, seen = qat(convert_on_fit_end=False), []
    reads = LambdaCallback(on_train_end=lambda *_: seen.append(callback.quantized))
    trainer(reads, callback, max_epochs=1).fit(Lit(), loader())
    assert seen == [None]
    assert callback.quantized is None


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_post_training_quantization_says_where_it_is_and_it_is_there(kind: Any, tmp_path: Path) -> None:
    callback, said = PostTrainingQuantization(kind=kind), []

    def too_early(*_: Any) -> None:
        with pytest.raises(ConversionError) as caught:
            callback.save(tmp_path / "never.int8")
        said.append(str(caught.value))

    earlier = LambdaCallback(on_train_end=too_early, on_fit_end=lambda *_: callback.save(tmp_path / "fit.int8"))
    later = LambdaCallback(on_train_end=lambda *_: callback.save(tmp_path / "train.int8"))
    trainer(earlier, callback, later, max_epochs=1).fit(Lit(), loader())
    assert "from on_train_end on, in the LightningModule and in callbacks listed after this one." in said[0]
    for name in ("train", "fit"):
        assert torch.equal(load_quantized(tmp_path / f"{name}.int8")(IMAGES), callback.quantized(IMAGES))
