"""A network that learns squares of noise in a second, and the data for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CPU = partial(Trainer, accelerator="cpu", devices=1)
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Data(LightningDataModule):
    """Images of noise with a bright quarter, which is the class. Its transfer hook counts what it was given."""

    def __init__(self, batch_size: int = 16, weight: float = 1.2) -> None:
        super().__init__()
        self.batch_size, self.weight, self.moved = batch_size, weight, 0

    def setup(self, stage: str) -> None:
        self.sets = {name: self._make(name) for name in ("fit", "validate", "test")}

    def _make(self, name: str) -> TensorDataset:
        count = {"fit": 128, "validate": 120, "test": 64}[name]
        generator = torch.Generator().manual_seed(["fit", "validate", "test"].index(name))
        images = torch.randn(count, 1, 8, 8, generator=generator)
        labels = torch.randint(4, (count,), generator=generator)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 2)
            image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += self.weight
        return TensorDataset(images, labels)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return batch

    def train_dataloader(self) -> Any:
        return DataLoader(self.sets["fit"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.sets["validate"], self.batch_size)

    def test_dataloader(self) -> Any:
        return DataLoader(self.sets["test"], self.batch_size)


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.second(torch.relu(self.first(x)))
        return found


class Lit(LightningModule):
    """Convolutions, and an accuracy that is worked out when the validation ends."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 4),
        )
        self.tests = 0
        self.right: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        scores = self.net(batch[0])
        self.right.append(scores.argmax(1) == batch[1])
        self.log("val/loss", F.cross_entropy(scores, batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.log("val/acc", torch.cat(self.right).float().mean())
        self.right = []

    def test_step(self, batch: Any, index: int) -> None:
        self.tests += 1
        self.log("test/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class LitBlock(Lit):
    """With a residual block in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, Block())


def trained(epochs: int = 2, of: type[Lit] = Lit) -> tuple[Lit, Data]:
    """A float network, the same each time."""
    seed_everything(0, verbose=False)
    model, data = of(), Data()
    CPU(max_epochs=epochs, limit_val_batches=0, **QUIET).fit(model, datamodule=data)
    return model, data
