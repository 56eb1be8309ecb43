"""The LightningModule of the demos: image classification with any network."""

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from qat_lightning.demos.optimization import AdamWModule


class ClassificationModule(AdamWModule):
    """Trains a network to classify, with AdamW and cross-entropy.

    Logs `train/loss`, `train/acc`, `val/loss`, `val/acc`, `test/loss` and `test/acc`.

    Args:
        net: Maps images to one score per class.
        num_classes: Number of classes.
        lr: Peak learning rate.
        weight_decay: Weight decay of AdamW; not applied to biases and normalization layers.
        scheduler: `cosine` decays to zero over the steps of the planned training; `constant` does not.
        label_smoothing: Label smoothing in training.

    Raises:
        ConfigurationError: `scheduler` is unknown.

    Example:
        >>> import torch
        >>> module = ClassificationModule(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), num_classes=3)
        >>> module(torch.zeros(5, 1, 2, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
        scheduler: Literal["cosine", "constant"] = "cosine",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(lr, weight_decay, scheduler)
        # not into the logger: train.py logs the whole configuration there
        self.save_hyperparameters(ignore=["net"], logger=False)
        self.net = net
        self.label_smoothing = label_smoothing
        self.train_acc = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Map images to one score per class."""
        scores: Tensor = self.net(x)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a training batch."""
        images, labels = batch
        scores = self(images)
        loss = cross_entropy(scores, labels, label_smoothing=self.label_smoothing)
        self.train_acc(scores, labels)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Evaluate a validation batch."""
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Evaluate a test batch."""
        self._evaluate("test", self.test_acc, batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the most likely class of each image."""
        most_likely: Tensor = self(batch[0]).argmax(-1)
        return most_likely

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        scores = self(images)
        accuracy(scores, labels)
        self.log(f"{stage}/loss", cross_entropy(scores, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}/acc", accuracy, batch_size=len(labels), prog_bar=stage == "val")
