"""A run resumed anywhere ends, bit by bit, like the uninterrupted one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from qat_lightning.demos import ClassificationModule, DigitsDataModule
from qat_lightning.demos.data import EpochSampler

SETTINGS: dict[str, Any] = {
    "max_epochs": 3,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "limit_val_batches": 2,
    "num_sanity_val_steps": 0,
}


def fit(trainer: Trainer, workers: int = 0, checkpoint: Path | None = None) -> LightningModule:
    seed_everything(0, verbose=False)
    # BatchNorm and augmentation: both would show a batch that is another
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    module = ClassificationModule(net, num_classes=10)
    data = DigitsDataModule(batch_size=200, num_workers=workers, seed=5, crop_padding=1, flip=True)
    trainer.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "checkpoint", "workers"),
    [
        ({}, {"every_n_train_steps": 1}, 0),
        ({}, {"every_n_epochs": 1}, 0),
        ({}, {"save_on_train_epoch_end": True}, 0),
        ({"limit_train_batches": 3}, {"every_n_train_steps": 1}, 0),
        ({"limit_train_batches": 0.5}, {"every_n_epochs": 1}, 0),
        ({"val_check_interval": 2}, {}, 0),
        ({"accumulate_grad_batches": 2}, {"every_n_train_steps": 1}, 0),
        ({"max_epochs": 2, "limit_train_batches": 3}, {"every_n_train_steps": 1}, 1),
        ({"max_epochs": 2}, {"every_n_epochs": 1}, 1),
    ],
    ids=str,
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(
    trainer: dict[str, Any], checkpoint: dict[str, Any], workers: int, tmp_path: Path
) -> None:
    settings = SETTINGS | trainer
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **checkpoint)
    whole = fit(Trainer(**settings, callbacks=[saving]), workers).state_dict()
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) >= settings["max_epochs"]
    for path in saved:
        resumed = fit(Trainer(**settings, enable_checkpointing=False), workers, path).state_dict()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), path.name


def test_two_runs_with_one_seed_are_equal_and_workers_change_nothing() -> None:
    first, second = (fit(Trainer(**SETTINGS, enable_checkpointing=False), n).state_dict() for n in (0, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_processes_share_an_epoch_without_overlap() -> None:
    shares = [list(EpochSampler(range(10), seed=0, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(10))
