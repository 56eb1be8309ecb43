"""Boxes in plain torch: IoU, suppression, assignment, decoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat_lightning.demos.boxes import (
    REACH,
    assign,
    best_boxes,
    decode,
    generalized_overlap,
    overlaps,
    places,
    suppress,
)

WHERE = places([(8, 8), (4, 4), (2, 2)], (8, 16, 32))


def drawn(count: int) -> Tensor:
    corners = 40 * torch.rand(count, 2)
    return torch.cat([corners, corners + 1 + 20 * torch.rand(count, 2)], 1)


def one_after_the_other(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> list[int]:
    shared = overlaps(boxes, boxes)
    kept: list[int] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if not any(labels[index] == labels[other] and shared[index, other] > threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize("count", [0, 1, 60])
def test_suppression_of_all_at_once_is_that_of_one_after_the_other(count: int) -> None:
    for _ in range(20):
        boxes, scores, labels = drawn(count), torch.rand(count), torch.randint(2, (count,))
        assert suppress(boxes, scores, labels, 0.3).tolist() == one_after_the_other(boxes, scores, labels, 0.3)


def test_of_boxes_in_a_chain_every_second_stays() -> None:
    left = torch.arange(9.0)[:, None]
    boxes = torch.cat([left, torch.zeros(9, 1), left + 3, torch.ones(9, 1)], 1)
    kept = suppress(boxes, -torch.arange(9.0), torch.zeros(9), 0.4)
    assert kept.tolist() == [0, 2, 4, 6, 8]


def test_pairs_overlap_as_each_with_each_does() -> None:
    boxes, others = drawn(20), drawn(20)
    shared, generalized = generalized_overlap(boxes, others)
    torch.testing.assert_close(shared, overlaps(boxes, others).diagonal())
    assert (generalized <= shared + 1e-6).all()
    assert (generalized > -1).all()
    torch.testing.assert_close(generalized_overlap(boxes, boxes)[1], torch.ones(20))


def test_empty_boxes_overlap_nothing() -> None:
    nothing = torch.zeros(1, 4)
    assert overlaps(nothing, nothing).item() == 0
    assert not generalized_overlap(nothing, nothing)[1].isnan()


@pytest.mark.parametrize("side", [2.0, 10.0, 40.0, 63.0])
def test_a_box_is_learned_on_one_level_near_its_centre(side: float) -> None:
    box = torch.tensor([[[0.5, 0.5, 0.5 + side, 0.5 + side]]])
    learned = (assign(WHERE, box, torch.tensor([[1]]))[0] >= 0).nonzero().flatten()
    assert len(learned) > 0
    (stride,) = WHERE.strides[learned].unique().tolist()
    assert stride == 8 or side / 2 > REACH * stride / 2
    assert ((WHERE.points[learned] - (0.5 + side / 2)).abs() <= 1.5 * stride).all()


def test_a_place_of_two_boxes_learns_the_smaller_and_padding_is_background() -> None:
    boxes = torch.tensor([[[8.0, 8, 56, 56], [16, 16, 48, 48], [0, 0, 64, 64]]])
    chosen = assign(WHERE, boxes, torch.tensor([[0, 1, -1]]))
    assert set(chosen.unique().tolist()) == {-1, 1}
    assert set(assign(WHERE, boxes, torch.tensor([[0, -1, -1]])).unique().tolist()) == {-1, 0}


def test_distances_are_decoded_to_the_boxes_that_they_are_of() -> None:
    box = torch.tensor([3.0, 5.0, 50.0, 60.0])
    inside = ((WHERE.points > box[:2]) & (WHERE.points < box[2:])).all(-1)
    edges = torch.cat([WHERE.points - box[:2], box[2:] - WHERE.points], -1) / WHERE.strides[:, None]
    decoded = decode(WHERE, edges.clamp(min=1e-3).log()[None])[0]
    torch.testing.assert_close(decoded[inside], box.expand(int(inside.sum()), 4), rtol=1e-4, atol=1e-3)


def test_what_is_reported_is_best_first_and_above_the_threshold() -> None:
    boxes, scores = drawn(50), torch.rand(50, 3)
    found = best_boxes(boxes, scores, score_threshold=0.6, iou_threshold=0.5, max_detections=7)
    assert found.boxes.shape == (7, 4)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert found.scores[0] == scores.max()
    none = best_boxes(boxes, scores, score_threshold=1.0, iou_threshold=0.5, max_detections=7)
    assert none.boxes.shape == (0, 4)
