"""Where quantization meets the rest of Lightning: processes, precisions, other callbacks, settings of the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    RichModelSummary,
    StochasticWeightAveraging,
)
from torch import Tensor

from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import ConfigurationError
from tests.callbacks.lit import MODES, Lit, loader, qat, trainer
from tests.callbacks.test_insert import BuiltInConfigureModel

ROOT = Path(__file__).parents[2]


def run(mode: str, *others: Any, module: Lit | None = None, **settings: Any) -> tuple[Lit, QuantizationAwareTraining]:
    """A fit and a test with the callback and others, of a network that learns its task."""
    torch.manual_seed(0)
    module, callback = module or Lit(), qat(mode, start=1)
    fitting = trainer(callback, *others, **{"max_epochs": 3} | settings)
    fitting.fit(module, loader(), loader())
    (metrics,) = fitting.test(module, loader(), verbose=False)
    assert metrics["test/acc"] > 0.9
    assert callback.fidelity["agreement"] > 0.95
    return module, callback


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.features)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.features, optimizer)


def averaging() -> Any:
    if not hasattr(lightning_callbacks, "EMAWeightAveraging"):
        pytest.skip("this release of Lightning has no WeightAveraging")
    return lightning_callbacks.EMAWeightAveraging(decay=0.9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make",
    [averaging, lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1), Unfreezing, RichModelSummary],
    ids=["ema", "swa", "finetuning", "summary"],
)
def test_with_other_callbacks(mode: str, make: Callable[[], Any]) -> None:
    run(mode, make())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"precision": "64-true", "module": "late"},
        {"gradient_clip_val": 5.0},
        {"inference_mode": False},
    ],
    ids=str,
)
def test_with_settings_of_the_trainer(mode: str, settings: dict[str, Any]) -> None:
    if settings.get("module") == "late":
        settings = settings | {"module": BuiltInConfigureModel()}
    module, _ = run(mode, **settings)
    state = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    ranges = {key for key in state if key.endswith(("min_val", "max_val"))}
    weights = {state[key].dtype for key in state.keys() - ranges} - {torch.int64}
    assert weights == {torch.float64 if settings.get("precision") == "64-true" else torch.float32}
    assert {state[key].dtype for key in ranges} == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
def test_the_average_is_tested_from_a_checkpoint(mode: str, tmp_path: Path) -> None:
    """The averaged network in the checkpoint is a copy, hooks and all, whose keys have another prefix."""
    average, saving = averaging(), ModelCheckpoint(tmp_path, monitor="val/loss")
    callback, module = qat(mode), Lit()
    fitting = trainer(callback, average, saving, max_epochs=2, enable_checkpointing=True)
    fitting.fit(module, loader(), loader())
    fitting.test(module, loader(), ckpt_path="best", verbose=False)
    assert saving.best_model_path in callback.quantized.source


def test_an_average_that_would_miss_the_preparation_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="EMAWeightAveraging comes before QuantizationAwareTraining"):
        trainer(averaging(), qat()).fit(Lit(), loader())


@pytest.mark.parametrize("mode", MODES)
def test_pruning(mode: str) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.2)
    if mode == "eager":
        run(mode, pruning)
    else:
        with pytest.raises(ConfigurationError, match="mode='eager'"):
            trainer(qat(mode), pruning).fit(Lit(), loader())


@pytest.mark.parametrize("settings", [{"overfit_batches": 1}, {"fast_dev_run": 2}, {"limit_train_batches": 0}], ids=str)
def test_short_runs(settings: dict[str, Any]) -> None:
    callback = qat()
    trainer(callback, **settings).fit(Lit(), loader(), loader())
    assert (callback.quantized is None) == ("limit_train_batches" in settings)


def test_barebones() -> None:
    callback = qat()
    Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[callback]).fit(Lit(), loader())
    assert callback.quantized is not None


class Sized(LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return loader(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader()


@pytest.mark.parametrize("find", ["lr", "batch_size"])
def test_tuning_before_the_fit_reaches_nothing(find: str, tmp_path: Path) -> None:
    """Their trial steps are undone, and with them what the schedule had reached."""
    tuner = (
        LearningRateFinder(num_training_steps=6, attr_name="lr")
        if find == "lr"
        else BatchSizeFinder(max_trials=2, steps_per_trial=3)
    )
    module, callback = Lit(), qat(start={"step": 3})
    module.lr = 0.01  # type: ignore[assignment]
    trainer(callback, tuner, default_root_dir=tmp_path).fit(module, datamodule=Sized())
    assert callback._float_step == 3
    assert callback.quantized is not None


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_is_not_finite_does_not_poison_the_ranges(mode: str) -> None:
    class Poisoned(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            if self.global_step == 2 and not self.trainer.sanity_checking:
                self.net(batch[0] * torch.nan)
                return None
            return super().training_step(batch, batch_idx)

    module, callback = Poisoned(), qat(mode)
    with torch.no_grad():
        before = {name: buffer.clone() for name, buffer in module.named_buffers() if "running" in name}
    trainer(callback, max_steps=3).fit(module, loader())
    assert before
    moved = [value for key, value in module.state_dict().items() if key.endswith(("min_val", "max_val"))]
    assert not any(torch.isnan(value) for value in moved)
