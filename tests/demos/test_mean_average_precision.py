"""Mean average precision: known values, and each image counted once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat_lightning.demos.boxes import Detections

pytest.importorskip("pycocotools")

from qat_lightning.demos.mean_average_precision import MeanAveragePrecision

BOXES = torch.tensor([[[0.0, 0, 40, 40], [50, 50, 90, 90]], [[10, 10, 30, 60], [0, 0, 0, 0]]])
LABELS = torch.tensor([[0, 1], [0, -1]])


def found(boxes: Tensor, labels: list[int], scores: list[float] | None = None) -> Detections:
    return Detections(boxes, torch.tensor(scores or [0.9] * len(labels)), torch.tensor(labels, dtype=torch.int64))


def batch(metric: MeanAveragePrecision, image: int, detections: Detections) -> None:
    metric.update([detections], BOXES[image : image + 1], LABELS[image : image + 1], torch.tensor([image]))


def measured(*batches: tuple[int, Detections]) -> tuple[float, float]:
    metric = MeanAveragePrecision()
    for image, detections in batches:
        batch(metric, image, detections)
    values = metric.compute()
    return float(values["map"]), float(values["map_50"])


def test_all_that_is_found_is_one_and_nothing_is_zero() -> None:
    assert measured((0, found(BOXES[0], [0, 1])), (1, found(BOXES[1, :1], [0]))) == (1, 1)
    nothing = found(torch.zeros(0, 4), [])
    assert measured((0, nothing), (1, nothing)) == (0, 0)


def test_the_mean_is_over_classes_that_have_boxes_and_over_overlaps() -> None:
    nothing = found(torch.zeros(0, 4), [])
    assert measured((0, found(BOXES[0, 1:], [1])), (1, nothing)) == (0.5, 0.5)  # all of one class, none of the other
    # an overlap of 0.78 is enough for six of the ten thresholds
    near = found(torch.tensor([[0.0, 0, 40, 31.2], [50, 50, 90, 81.2]]), [0, 1])
    assert measured((0, near)) == (pytest.approx(0.6), 1)


def test_without_a_box_there_is_no_precision() -> None:
    metric = MeanAveragePrecision()
    assert metric.compute()["map"].isnan()
    metric.reset()
    metric.update([found(BOXES[0], [0, 1])], BOXES[1:, 1:], LABELS[1:, 1:], torch.tensor([3]))
    assert metric.compute()["map"].isnan()


def test_an_image_that_two_processes_saw_counts_once() -> None:
    right, wrong = found(BOXES[0], [0, 1]), found(BOXES[1, :1] + 40, [0], [0.95])
    once = measured((0, right), (1, wrong))
    assert measured((0, right), (1, wrong), (1, wrong)) == once
    assert 0 < once[0] < 1


def test_the_order_of_images_changes_nothing() -> None:
    right, wrong = found(BOXES[0], [0, 1], [0.6, 0.7]), found(BOXES[1, :1] + 40, [0], [0.65])
    assert measured((0, right), (1, wrong)) == measured((1, wrong), (0, right))
