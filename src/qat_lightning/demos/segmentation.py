"""The LightningModule for semantic segmentation."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from qat_lightning.demos.optimization import AdamWModule


class SegmentationModule(AdamWModule):
    """Trains a network to classify each pixel, with AdamW and cross-entropy.

    Logs `train/loss`, and for `val/` and `test/` the loss, the mean intersection over union of the classes (`miou`) and
    the pixel accuracy (`acc`).

    Args:
        net: Maps images of shape (N, C, H, W) to scores of shape (N, num_classes, H, W).
        num_classes: Number of classes, without void.
        ignore_index: Label of pixels that are ignored in losses and metrics.
        label_smoothing: Label smoothing in training.
        optimization: `lr`, `weight_decay` and `scheduler` of `AdamWModule`.

    Example:
        >>> import torch
        >>> module = SegmentationModule(nn.Conv2d(1, 3, 1), num_classes=3)
        >>> module(torch.zeros(5, 1, 6, 8)).shape
        torch.Size([5, 3, 6, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        ignore_index: int = 255,
        label_smoothing: float = 0.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.save_hyperparameters(ignore=["net"], logger=False)
        self.net = net
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.val_miou, self.test_miou = (MulticlassJaccardIndex(num_classes, ignore_index=ignore_index) for _ in "12")
        self.val_acc, self.test_acc = (
            MulticlassAccuracy(num_classes, average="micro", ignore_index=ignore_index) for _ in "12"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images to one score per class and pixel."""
        scores: Tensor = self.net(x)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a training batch."""
        images, masks = batch
        loss = self._loss(self(images), masks, self.label_smoothing)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Evaluate a validation batch."""
        self._evaluate("val", self.val_miou, self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Evaluate a test batch."""
        self._evaluate("test", self.test_miou, self.test_acc, batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the most likely class of each pixel, of shape (N, H, W)."""
        most_likely: Tensor = self(batch[0]).argmax(1)
        return most_likely

    def _evaluate(
        self, stage: str, miou: MulticlassJaccardIndex, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]
    ) -> None:
        images, masks = batch
        scores = self(images)
        classes = scores.argmax(1)
        miou(classes, masks)
        accuracy(classes, masks)
        self.log(f"{stage}/loss", self._loss(scores, masks), batch_size=len(masks), sync_dist=True)
        self.log(f"{stage}/miou", miou, batch_size=len(masks), prog_bar=stage == "val")
        self.log(f"{stage}/acc", accuracy, batch_size=len(masks))

    def _loss(self, scores: Tensor, masks: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean over pixels that are not ignored; 0 if there are none."""
        summed = cross_entropy(
            scores, masks, ignore_index=self.ignore_index, label_smoothing=label_smoothing, reduction="sum"
        )
        return summed / (masks != self.ignore_index).sum().clamp_min(1)
