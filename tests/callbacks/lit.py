"""Shared by the tests of the callback: a small network, its task, and Trainers that write no files."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining

MODES = ("eager", "fx", "pt2e")
CLASSES = 4


class Net(nn.Module):
    """A convolution with BatchNorm, dropout, a separate BatchNorm, and a linear layer."""

    temperature = 2.0

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(72)
        self.head = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.drop(self.features(x).flatten(1))))

    def soften(self, scores: Tensor) -> Tensor:
        return scores / self.temperature


class Lit(LightningModule):
    """Trains a network to find the bright quarter of an image."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net if net is not None else Net()
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def _evaluate(self, stage: str, batch: Any) -> None:
        scores = self(batch[0])
        self.accuracy(scores, batch[1])
        self.log(f"{stage}/loss", F.cross_entropy(scores, batch[1]))
        self.log(f"{stage}/acc", self.accuracy)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


def dataset(count: int = 64, seed: int = 0) -> TensorDataset:
    """Noise images with one brighter quarter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = 0.5 * torch.randn(count, 1, 8, 8, generator=generator)
    for label in range(CLASSES):
        rows, columns = divmod(label, 2)
        images[labels == label, :, rows * 4 : rows * 4 + 4, columns * 4 : columns * 4 + 4] += 1.0
    return TensorDataset(images, labels)


def loader(count: int = 64, batch_size: int = 16, shuffle: bool = False, **settings: Any) -> DataLoader[Any]:
    """4 batches by default."""
    return DataLoader(dataset(count), batch_size=batch_size, shuffle=shuffle, **settings)


def trainer(*callbacks: Any, **settings: Any) -> Trainer:
    """A quiet Trainer on the CPU: 2 epochs, no logger and no checkpoints."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**quiet | settings, callbacks=list(callbacks))


def qat(mode: str = "fx", **settings: Any) -> QuantizationAwareTraining:
    """The callback with settings for a fit of a few steps."""
    return QuantizationAwareTraining(mode=mode, **settings)


def state(module: nn.Module) -> dict[str, Any]:
    """A copy of a ``state_dict``."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in module.state_dict().items()}


def assert_same_state(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Compare bit by bit, including the keys."""
    assert left.keys() == right.keys()
    moved = [k for k, v in left.items() if isinstance(v, Tensor) and not torch.equal(v, right[k])]
    assert not moved, f"differ: {moved}"


def ranges(module: nn.Module) -> dict[str, Tensor]:
    """The activation ranges of a prepared network."""
    return {k: v.clone() for k, v in module.state_dict().items() if k.endswith(("min_val", "max_val"))}


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """The running statistics of BatchNorm."""
    endings = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v.clone() for k, v in module.state_dict().items() if k.endswith(endings)}
