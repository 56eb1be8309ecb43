"""A fit that is interrupted, resumed, interrupted and resumed again, with either callback."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch.optim.swa_utils import SWALR

from qat_lightning.callbacks.post_training_quantization import PostTrainingQuantization
from qat_lightning.demos.data.resumable import resumable_loader
from tests.callbacks.lit import Lit, loader, qat, trainer


class BreaksOff(Callback):
    """Ends a fit like a signal would, within an epoch."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise SystemExit


def fit(folder: Path, made: Callback, at: int | None) -> tuple[int, dict[str, torch.Tensor]]:
    keeps = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
    module = Lit()
    run = trainer(made, BreaksOff(at), keeps, enable_checkpointing=True, max_epochs=3)
    try:
        run.fit(module, loader(64, batch_size=16), ckpt_path="last")
    except SystemExit:
        assert at is not None
    return run.global_step, module.state_dict()


@pytest.mark.parametrize("make", [lambda: qat(), lambda: PostTrainingQuantization("fx")], ids=["qat", "ptq"])
@pytest.mark.slow
def test_every_step_is_taken_once(make: Callable[[], Callback], tmp_path: Path) -> None:
    whole, wanted = fit(tmp_path / "whole", make(), None)
    assert whole == 12
    assert fit(tmp_path / "parts", make(), 6)[0] == 6  # its last checkpoint is of the end of the first epoch
    assert fit(tmp_path / "parts", make(), 8)[0] == 8
    steps, got = fit(tmp_path / "parts", make(), None)
    assert steps == whole
    assert got.keys() == wanted.keys()


def averaged(folder: Path, at: int | None) -> dict[str, torch.Tensor]:
    """The final weights of a fit with stochastic weight averaging."""
    seed_everything(0, verbose=False)
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    keeps = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    module = Lit()
    run = trainer(qat(), averaging, BreaksOff(at), keeps, enable_checkpointing=True, max_epochs=3)
    data = resumable_loader(loader(64).dataset, batch_size=16, seed=1, shuffle=True)
    try:
        run.fit(module, data, ckpt_path="last")
    except SystemExit:
        assert at is not None
    return module.state_dict()


def restores_averaging() -> bool:
    """torch 2.9 stores a function in the state of `SWALR` that ``torch.load`` does not load by default."""
    scheduler = SWALR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), swa_lr=0.1)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


@pytest.mark.skipif(not restores_averaging(), reason="this torch cannot restore the state of SWALR, by whomever saved")
def test_averaging_of_weights_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    wanted = averaged(tmp_path / "whole", None)
    for at in (3, 5):
        averaged(tmp_path / "parts", at)
    got = averaged(tmp_path / "parts", None)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted if wanted[name].is_floating_point())
