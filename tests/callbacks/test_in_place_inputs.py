"""Networks whose forward changes its inputs in place: what is compared with them gets the inputs as they were."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qat_lightning import QuantizationAwareTraining, QuantizedModelExport

pytestmark = pytest.mark.usefixtures("without_compiler")


class Normalizes(nn.Module):
    """Scales its input in place before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.25)
        return self.head(self.convolution(x).relu().mean((2, 3)))


class Lit(LightningModule):
    """Trains it on random images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Normalizes()

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def test_step(self, batch: Tensor) -> None:
        self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_int8_and_fake_quant_get_the_same_inputs_in_tests_and_exports(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = DataLoader(torch.rand(16, 3, 6, 6), 4)  # type: ignore[arg-type]
    qat = QuantizationAwareTraining(mode, "x86")
    export = QuantizedModelExport(["torchscript"], dirpath=tmp_path)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[qat, export], **quiet)  # type: ignore[arg-type]
    model = Lit()
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert qat.fidelity["sqnr_db"] == math.inf
    written = export.results["torchscript"]
    assert written.files
    assert written.sqnr_db is not None
    assert written.sqnr_db > 60
