"""The user's own metric on parts of the validation data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from qat_lightning.errors import ConfigurationError
from qat_lightning.ladder.parts import validate_parts, validate_whole
from tests.ladder.lit import CPU, Data, Lit

SILENT: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_each_batch_is_validated_by_itself_and_logs_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Lit(), Data()
    logger = CSVLogger(tmp_path)
    trainer = CPU(logger=logger, **SILENT)
    whole = validate_whole(trainer, model, data)
    logged = dict(logger.experiment.metrics[-1]) if logger.experiment.metrics else {}
    moved = data.moved
    parts = validate_parts(trainer, model, data, "val/acc", 0, 8)
    assert parts.samples == (16,) * 7 + (8,)
    assert data.moved == 2 * moved, "the hooks of the datamodule are called"
    weighted = sum(value * n for value, n in zip(parts.values, parts.samples, strict=True)) / 120
    assert weighted == pytest.approx(whole["val/acc"], abs=1e-6)
    model.eval()
    data.setup("validate")
    with torch.no_grad():
        by_hand = [float((model.net(x).argmax(1) == y).float().mean()) for x, y in data.val_dataloader()]
    assert parts.values == pytest.approx(by_hand, abs=1e-6)
    assert dict(logger.experiment.metrics[-1]) == logged if logger.experiment.metrics else True
    assert trainer.loggers == [logger]


def test_many_batches_are_parts_of_several_and_limits_are_kept() -> None:
    model, data = Lit(), Data(batch_size=2)
    trainer = CPU(logger=False, **SILENT)
    validate_whole(trainer, model, data)
    assert validate_parts(trainer, model, data, "val/loss", 0, 60).samples == (4,) * 30
    assert validate_parts(trainer, model, data, "val/loss", 0, None).samples == (2,) * 60
    trainer = CPU(logger=False, limit_val_batches=3, **SILENT)
    validate_whole(trainer, model, data)
    assert validate_parts(trainer, model, data, "val/loss", 0, 3).samples == (2, 2, 2)
    assert trainer.limit_val_batches == 3


def test_several_loaders_are_refused() -> None:
    class Two(Data):
        def val_dataloader(self) -> Any:
            return [DataLoader(self.sets["validate"], 16), DataLoader(self.sets["test"], 16)]

    class Steps(Lit):
        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, index)

    with pytest.raises(ConfigurationError, match="2 loaders"):
        validate_whole(CPU(logger=False, **SILENT), Steps(), Two())


def test_one_loader_in_a_list_is_that_loader() -> None:
    class Listed(Data):
        def val_dataloader(self) -> Any:
            return [super().val_dataloader()]

    found = []
    for of in (Data, Listed):
        torch.manual_seed(0)
        model, data = Lit(), of()
        trainer = CPU(logger=False, **SILENT)
        validate_whole(trainer, model, data)
        found.append(validate_parts(trainer, model, data, "val/acc", 0, 8))
    assert found[0] == found[1]


def test_a_metric_that_is_not_finite_on_a_part_has_no_mean() -> None:
    class Sometimes(Lit):
        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.log("val/f1", float("nan") if len(self.right[-1]) == 8 else 1.0)
            super().on_validation_epoch_end()

    model, data = Sometimes(), Data()
    trainer = CPU(logger=False, **SILENT)
    validate_whole(trainer, model, data)
    parts = validate_parts(trainer, model, data, "val/acc", 0, 8)
    assert parts.means.keys() == {"val/acc", "val/loss"}
    assert math.isnan(validate_parts(trainer, model, data, "val/f1", 0, 8).values[-1])
