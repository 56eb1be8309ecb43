"""``last.ckpt`` has the latest state of a fit, whether or not the score improved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from qat_lightning.callbacks.last_checkpoint import LastCheckpoint
from tests.callbacks.lit import Lit, loader, qat, trainer


class GetsWorse(Lit):
    """Logs a score that only decreases."""

    def on_train_epoch_end(self) -> None:
        self.log("score", -float(self.current_epoch))


def best(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="best", monitor="score", mode="max", **options)


def step(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def fit(module: LightningModule, *callbacks: Any, **options: Any) -> Trainer:
    made = trainer(*callbacks, enable_checkpointing=True, **options)
    made.fit(module, loader(), ckpt_path=options.pop("ckpt_path", None))
    return made


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"max_epochs": 3}),
        ({"every_n_train_steps": 2}, {"max_epochs": 3}),
        ({"every_n_train_steps": 1000}, {"max_epochs": 2}),
        ({}, {"max_epochs": 3, "max_steps": 6}),
    ],
)
def test_it_is_the_last_state_and_the_best_is_another(
    given: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    made = fit(GetsWorse(), best(tmp_path), LastCheckpoint(tmp_path, **given), **options)
    assert step(tmp_path / "last.ckpt") == made.global_step
    assert step(tmp_path / "best.ckpt") < made.global_step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_resumed_fit_writes_the_same_file_and_knows_the_best(tmp_path: Path) -> None:
    fit(GetsWorse(), qat(), best(tmp_path), LastCheckpoint(tmp_path), max_epochs=2)
    kept = best(tmp_path)
    made = trainer(qat(), kept, LastCheckpoint(tmp_path), enable_checkpointing=True, max_epochs=4)
    made.fit(GetsWorse(), loader(), ckpt_path="last")
    assert step(tmp_path / "last.ckpt") == made.global_step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert Path(kept.best_model_path).name == "best.ckpt"


def test_it_stands_beside_another_without_a_monitor(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path / "all", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    made = fit(Lit(), every, LastCheckpoint(tmp_path, every_n_train_steps=1), max_epochs=1)
    assert step(tmp_path / "last.ckpt") == made.global_step
