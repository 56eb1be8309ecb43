"""COCO's mean average precision, computed by pycocotools and synchronized over processes."""

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from qat_lightning.demos.boxes import Detections, area
from qat_lightning.demos.extras import require


class MeanAveragePrecision(Metric):
    """Mean average precision over classes and IoU thresholds from 0.5 to 0.95, and for the threshold 0.5.

    This is COCO's AP (Lin et al., 2014, "Microsoft COCO: Common Objects in Context"), with at most 100 detections per
    image. Distributed samplers repeat some images to give all processes equally many; each image counts once.

    Args:
        settings: See `torchmetrics.Metric`.

    Raises:
        MissingExtraError: pycocotools is not installed.

    Example:
        >>> metric = MeanAveragePrecision()
        >>> box = torch.tensor([[10.0, 10, 50, 50]])
        >>> right = Detections(box, torch.tensor([0.9]), torch.tensor([1]))
        >>> metric.update([right], box[None], torch.tensor([[1]]), torch.tensor([0]))
        >>> metric.compute()
        {'map': tensor(1.), 'map_50': tensor(1.)}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    images: Any
    found: Any
    found_labels: Any
    true: Any
    true_labels: Any

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for module in ("pycocotools.coco", "pycocotools.cocoeval"):
            require(module, needed_for="The mean average precision", extra="detection")
        # One row per image, and its boxes in the same order, so that they match after synchronization.
        for name in ("images", "found", "found_labels", "true", "true_labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, detections: Sequence[Detections], boxes: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """Add a batch.

        Args:
            detections: The detections in each of N images.
            boxes: The true boxes, float of shape (N, M, 4).
            labels: Their classes, int64 of shape (N, M); -1 for no box.
            numbers: Index of each image in the dataset, int64 of shape (N,).
        """
        there = labels >= 0
        counts = [torch.tensor([len(each.scores) for each in detections], device=self.device), there.sum(1)]
        self.images.append(torch.stack([numbers.to(self.device), *(count.to(self.device) for count in counts)], 1))
        self.found.append(torch.cat([torch.cat([each.boxes, each.scores[:, None]], 1) for each in detections]))
        self.found_labels.append(torch.cat([each.labels for each in detections]))
        self.true.append(boxes[there])
        self.true_labels.append(labels[there])

    def compute(self) -> dict[str, Tensor]:
        """Return ``map`` and ``map_50`` from 0 to 1; NaN if no image has a box."""
        if len(self.images) == 0:  # lists, or tensors after synchronization
            return {name: torch.tensor(math.nan) for name in ("map", "map_50")}
        states = (self.images, self.found, self.found_labels, self.true, self.true_labels)
        images, found, found_labels, true, true_labels = (dim_zero_cat(state).cpu() for state in states)
        found_in, true_in = _images_of(images, 1), _images_of(images, 2)
        # COCO's tables use ids from 1; 0 means no match.
        truth = _table(true, true_labels, true_in)
        return _evaluate(truth, _table(found[:, :4], found_labels, found_in, found[:, 4]))


def _images_of(images: Tensor, column: int) -> Tensor:
    """Return the image index of each row; -1 for duplicates of an image that another process also has."""
    numbers = images[:, 0].tolist()
    first = {number: row for row, number in reversed(list(enumerate(numbers)))}
    counted = [number if first[number] == row else -1 for row, number in enumerate(numbers)]
    return torch.tensor(counted, dtype=torch.int64).repeat_interleave(images[:, column])


def _table(boxes: Tensor, labels: Tensor, images: Tensor, scores: Tensor | None = None) -> list[dict[str, Any]]:
    kept = (images >= 0).nonzero().flatten().tolist()
    corners, areas = boxes.tolist(), area(boxes).tolist()
    return [
        {
            "id": number,
            "image_id": int(images[row]),
            "category_id": int(labels[row]),
            "bbox": [
                corners[row][0],
                corners[row][1],
                corners[row][2] - corners[row][0],
                corners[row][3] - corners[row][1],
            ],
            "area": areas[row],
            "iscrowd": 0,
            **({} if scores is None else {"score": float(scores[row])}),
        }
        for number, row in enumerate(kept, start=1)
    ]


def _evaluate(truth: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, Tensor]:
    coco = require("pycocotools.coco", needed_for="The mean average precision", extra="detection")
    evaluation = require("pycocotools.cocoeval", needed_for="The mean average precision", extra="detection")
    images = [{"id": number} for number in sorted({row["image_id"] for row in (*truth, *found)})]
    categories = [{"id": label} for label in sorted({row["category_id"] for row in truth})]
    tables = []
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        for rows in (truth, found):
            table = coco.COCO()
            table.dataset = {"images": images, "categories": categories, "annotations": rows}
            table.createIndex()
            tables.append(table)
        run = evaluation.COCOeval(*tables, iouType="bbox")
        run.evaluate()
        run.accumulate()
    # overlaps x recalls x classes x sizes of boxes (all first) x most detections (100 last); -1: a class has no boxes
    precision = torch.from_numpy(run.eval["precision"])[:, :, :, 0, -1]
    return {"map": _mean(precision), "map_50": _mean(precision[0])}


def _mean(precision: Tensor) -> Tensor:
    return precision[precision > -1].mean().float()
