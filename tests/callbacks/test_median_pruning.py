"""Trials that are worse than the median of their siblings end early."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from qat_lightning.callbacks.median_pruning import MedianPruning
from qat_lightning.errors import ConfigurationError

LOADER = torch.utils.data.DataLoader(torch.zeros(2, 1))


class Says(LightningModule):
    """Logs the same value in every validation."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.value = value

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/acc", self.value)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(folder: Path, value: float, **settings: object) -> tuple[Trainer, MedianPruning]:
    pruning = MedianPruning(folder, min_trials=2, **{"warmup_epochs": 2, **settings})
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Says(value), LOADER, LOADER)
    return trainer, pruning


def test_a_trial_below_the_median_of_enough_others_ends_after_the_warmup(tmp_path: Path) -> None:
    assert fitted(tmp_path / "0", 0.1)[0].current_epoch == 4, "alone"
    assert fitted(tmp_path / "1", 0.8)[0].current_epoch == 4, "one other is not enough"
    trainer, pruning = fitted(tmp_path / "2", 0.2)
    assert trainer.current_epoch == 2
    assert "0.2" in pruning.pruned
    assert "median of 2 others 0.45" in pruning.pruned
    assert json.loads((tmp_path / "2" / "curve.json").read_text()) == {"1": pytest.approx(0.2), "2": pytest.approx(0.2)}
    assert fitted(tmp_path / "3", 0.9)[1].pruned == ""


def test_smaller_can_be_better_and_it_can_be_turned_off(tmp_path: Path) -> None:
    for number, value in enumerate((0.1, 0.2)):
        fitted(tmp_path / str(number), value, mode="min")
    assert fitted(tmp_path / "2", 0.9, mode="min", enabled=False)[0].current_epoch == 4
    assert fitted(tmp_path / "3", 0.9, mode="min")[0].current_epoch == 2


def test_a_run_outside_a_sweep_is_never_ended(tmp_path: Path) -> None:
    for number in range(3):
        fitted(tmp_path / str(number), 0.9)
    assert fitted(tmp_path / "mine", 0.1)[0].current_epoch == 4


def test_a_metric_that_is_not_logged_is_an_error_that_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="val/acc was"):
        fitted(tmp_path / "0", 0.1, monitor="val/accuracy")


@pytest.mark.parametrize("wrong", [{"mode": "best"}, {"warmup_epochs": 0}, {"min_trials": True}, {"monitor": ""}])
def test_wrong_settings_are_refused_at_construction(wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        MedianPruning(tmp_path, **wrong)


def test_a_trial_that_has_diverged_ends_and_counts_for_no_other(tmp_path: Path) -> None:
    for index, value in enumerate((0.8, 0.9)):
        fitted(tmp_path / str(index), value)
    trainer, pruning = fitted(tmp_path / "2", float("nan"))
    assert trainer.current_epoch == 2
    assert pruning.pruned == "val/acc had no finite value until epoch 2"
    assert json.loads((tmp_path / "2" / "curve.json").read_text()) == {}
    assert fitted(tmp_path / "3", 0.85)[1].pruned == "", "the median is that of the two others"
