"""The LightningModule of segmentation: a class for each pixel."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassJaccardIndex

from qat_lightning.demos.classification import ClassificationModule


class SegmentationModule(ClassificationModule):
    """Trains a network to say what each pixel shows, with AdamW and cross-entropy.

    Logs `train/loss`, and the loss and the mean intersection over union (`miou`) of `val/` and `test/`.

    Args:
        net: Images of shape (N, C, H, W) in, scores of shape (N, num_classes, H, W) out.
        num_classes: How many classes there are, without void.
        ignore_index: The class of pixels that count nowhere.
        settings: Those of `ClassificationModule`.
    """

    def __init__(self, net: nn.Module, num_classes: int, ignore_index: int = 255, **settings: Any) -> None:
        super().__init__(net, num_classes, **settings)
        self.ignore_index = ignore_index
        self.val_miou = MulticlassJaccardIndex(num_classes, ignore_index=ignore_index)
        self.test_miou = MulticlassJaccardIndex(num_classes, ignore_index=ignore_index)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One batch of training."""
        loss = cross_entropy(
            self(batch[0]), batch[1], ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One batch of validation."""
        self._measure("val", self.val_miou, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One batch of the test."""
        self._measure("test", self.test_miou, batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The most likely class of each pixel, of shape (N, H, W)."""
        most_likely: Tensor = self(batch[0]).argmax(1)
        return most_likely

    def _measure(self, stage: str, miou: MulticlassJaccardIndex, batch: tuple[Tensor, Tensor]) -> None:
        scores, masks = self(batch[0]), batch[1]
        miou(scores, masks)
        loss = cross_entropy(scores, masks, ignore_index=self.ignore_index)
        self.log(f"{stage}/loss", loss, batch_size=len(masks), sync_dist=True)
        self.log(f"{stage}/miou", miou, batch_size=len(masks), prog_bar=stage == "val")
