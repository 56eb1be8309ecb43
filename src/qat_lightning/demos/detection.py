"""The LightningModule for detectors: assignment of boxes to locations, losses, decoding, and mean average precision."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from qat_lightning.demos.boxes import (
    Detections,
    Places,
    assign,
    best_boxes,
    decode,
    generalized_overlap,
    places,
)
from qat_lightning.demos.mean_average_precision import MeanAveragePrecision
from qat_lightning.demos.optimization import AdamWModule
from qat_lightning.errors import ConfigurationError

ALPHA, GAMMA = 0.25, 2.0
"""Alpha and gamma of the focal loss, as in its paper."""

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images (N, C, H, W), boxes (N, M, 4), M at least 1, labels (N, M) with -1 for no box, and image indices (N,)."""


class Found(NamedTuple):
    """A network's outputs for all locations of its levels.

    Attributes:
        where: The P locations.
        scores: Class scores before the sigmoid, of shape (N, P, C).
        boxes: Boxes in pixels, of shape (N, P, 4).
        quality: Predicted IoU before the sigmoid, of shape (N, P).
    """

    where: Places
    scores: Tensor
    boxes: Tensor
    quality: Tensor


class DetectionModule(AdamWModule):
    """Trains a network to detect objects, with AdamW, a focal loss for classes and generalized IoU for boxes.

    A quantizing callback quantizes only the network; everything else is in this class and stays float. The score of a
    detection is the square root of class probability times quality, which is trained to predict the IoU with the true
    box (Wu et al., 2020, "IoU-aware Single-stage Object Detector").

    Logs `train/loss`, `val/loss`, `val/map`, `val/map_50`, `test/loss`, `test/map` and `test/map_50`. `map` is the
    mean average precision over IoU thresholds from 0.5 to 0.95, as defined by COCO; `map_50` uses 0.5.

    Args:
        net: Maps images to scores, logarithms of distances and quality for each level, like
            `qat_lightning.demos.SingleShot`. Its attribute ``strides`` has the pixels between locations of each level.
        num_classes: Number of object classes.
        lr: Peak learning rate.
        weight_decay: Weight decay of AdamW; not applied to biases and normalization layers.
        scheduler: `cosine` decays to zero over the steps of the planned training; `constant` does not.
        score_threshold: Detections with lower scores are dropped.
        iou_threshold: IoU threshold of non-maximum suppression.
        max_detections: Maximum number of detections per image.

    Raises:
        ConfigurationError: `scheduler` is unknown, a threshold is not from 0 to 1, or the network has no ``strides``.
        MissingExtraError: pycocotools is not installed.

    Example:
        >>> from qat_lightning.demos import SingleShot
        >>> module = DetectionModule(SingleShot(2, width=4, channels=8), num_classes=2, max_detections=7)
        >>> found = module.detect(module.look(torch.zeros(1, 3, 64, 64)))
        >>> found[0].boxes.shape, found[0].scores.shape
        (torch.Size([7, 4]), torch.Size([7]))
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
        scheduler: Literal["cosine", "constant"] = "cosine",
        score_threshold: float = 0.05,
        iou_threshold: float = 0.6,
        max_detections: int = 100,
    ) -> None:
        super().__init__(lr, weight_decay, scheduler)
        strides: Any = getattr(net, "strides", None)
        if not isinstance(strides, Sequence) or not strides:
            raise ConfigurationError(
                f"{type(net).__name__} does not say the pixels between places of its levels: give it an attribute like "
                "strides = (8, 16, 32)."
            )
        for name, value in (("score_threshold", score_threshold), ("iou_threshold", iou_threshold)):
            if not 0 <= value <= 1:
                raise ConfigurationError(f"{name}={value!r} is not valid: give a number from 0 to 1.")
        self.save_hyperparameters(ignore=["net"], logger=False)
        self.net = net
        self.num_classes = num_classes
        self.strides: tuple[int, ...] = tuple(strides)
        self.report: dict[str, Any] = {
            "score_threshold": score_threshold,
            "iou_threshold": iou_threshold,
            "max_detections": max_detections,
        }
        self.val_map, self.test_map = MeanAveragePrecision(), MeanAveragePrecision()

    def forward(self, x: Tensor) -> Any:
        """Run the network; return its levels."""
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a training batch."""
        images, boxes, labels, _ = _with_boxes(batch)
        loss = self.loss(self.look(images), boxes, labels)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate a validation batch."""
        self._evaluate("val", self.val_map, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the mean average precision."""
        self._log_precision("val", self.val_map)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate a test batch."""
        self._evaluate("test", self.test_map, batch)

    def on_test_epoch_end(self) -> None:
        """Log the mean average precision."""
        self._log_precision("test", self.test_map)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Detections]:
        """Detect the objects in each image, in pixels of the network's input."""
        return self.detect(self.look(batch[0]))

    def look(self, images: Tensor) -> Found:
        """Run the network.

        Args:
            images: Images of shape (N, C, H, W).

        Returns:
            Its outputs for all locations, in float32.
        """
        levels = self(images)
        sizes = [(scores.shape[-2], scores.shape[-1]) for scores, _, _ in levels]
        where = places(sizes, self.strides, images.device)
        scores, distances, quality = (
            torch.cat([output.flatten(2) for output in outputs], 2).transpose(1, 2).float()
            for outputs in zip(*levels, strict=True)
        )
        return Found(where, scores, decode(where, distances), quality.squeeze(2))

    def detect(self, found: Found) -> list[Detections]:
        """Return the detections of each image."""
        scores = (found.scores.sigmoid() * found.quality.sigmoid()[..., None]).sqrt()
        return [best_boxes(boxes, each, **self.report) for boxes, each in zip(found.boxes, scores, strict=True)]

    def loss(self, found: Found, boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses for classes, boxes and quality, divided by the number of locations with a box.

        The class loss is the focal loss of Lin et al., 2017, "Focal Loss for Dense Object Detection".

        Args:
            found: The network's outputs.
            boxes: The true boxes, of shape (N, M, 4).
            labels: Their classes, of shape (N, M); -1 for no box.

        Returns:
            A scalar.
        """
        chosen = assign(found.where, boxes, labels)
        taken = chosen >= 0
        index = chosen.clamp(min=0)
        targets = one_hot(labels.gather(1, index).clamp(min=0), self.num_classes) * taken[..., None]
        count = taken.sum().clamp(min=1)
        true_boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))[taken]
        overlap, generalized = generalized_overlap(found.boxes[taken], true_boxes)
        quality = binary_cross_entropy_with_logits(found.quality[taken], overlap.detach(), reduction="sum")
        return (_focal(found.scores, targets.float()) + (1 - generalized).sum() + quality) / count

    def _evaluate(self, stage: str, precision: MeanAveragePrecision, batch: Batch) -> None:
        images, boxes, labels, numbers = _with_boxes(batch)
        found = self.look(images)
        precision.update(self.detect(found), boxes, labels, numbers)
        self.log(f"{stage}/loss", self.loss(found, boxes, labels), batch_size=len(images), sync_dist=True)

    def _log_precision(self, stage: str, precision: MeanAveragePrecision) -> None:
        for name, value in precision.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=stage == "val" and name == "map")
        precision.reset()


def _focal(scores: Tensor, targets: Tensor) -> Tensor:
    loss = binary_cross_entropy_with_logits(scores, targets, reduction="none")
    chance = scores.sigmoid()
    missed = torch.where(targets > 0, 1 - chance, chance)
    weight = torch.where(targets > 0, ALPHA, 1 - ALPHA)
    return (weight * missed**GAMMA * loss).sum()


def _with_boxes(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 4:
        raise ConfigurationError(
            "A detector learns from images, boxes, labels and numbers of images, and the data has something else: "
            "choose data=detection_csv."
        )
    images, boxes, labels, numbers = batch
    return images, boxes, labels, numbers
