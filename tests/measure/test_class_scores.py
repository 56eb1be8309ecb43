"""Which outputs are class scores, for which top-1 is meaningful, and which only have their shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qat_lightning.measure.class_scores import ClassScores
from qat_lightning.measure.fidelity import Fidelity
from qat_lightning.measure.metrics import outputs_by_path

N = 6
IMAGES = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _axis(outputs: Any, data: Any, inputs: Any = IMAGES, calls: int = 2, classes: tuple[int, ...] = ()) -> Any:
    scores = ClassScores(classes)
    for _ in range(calls):
        scores.update(outputs_by_path(outputs), inputs, data)
    return scores.axis


def _classes(*shape: int, count: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % count


SCORES = {
    "classes": (torch.randn(N, 5), {"y": _classes(N, count=5)}, ("", 1)),
    "a column of labels": (torch.randn(N, 5), (IMAGES, _classes(N, 1, count=5)), ("", 1)),
    "one-hot labels": (torch.randn(N, 5), (IMAGES, torch.eye(5)[_classes(N, count=5)]), ("", 1)),
    "the second output": ((torch.randn(N, 4, 9), torch.randn(N, 5)), [_classes(N, count=5)], ("[1]", 1)),
    "pixels": ({"out": torch.randn(N, 4, 8, 8)}, (IMAGES, _classes(N, 8, 8, count=4)), ("['out']", 1)),
    "pixels with a channel": (torch.randn(N, 4, 8, 8), (IMAGES, _classes(N, 1, 8, 8, count=4)), ("", 1)),
    "pixels of another size": (torch.randn(N, 4, 2, 2), (IMAGES, _classes(N, 8, 8, count=4)), ("", 1)),
    "pixels that do not count": (
        torch.randn(N, 2, 2, 2),
        torch.tensor([[255, -100], [0, 1]]).repeat(N, 1, 1),
        ("", 1),
    ),
    "anchors": ({"cls": torch.randn(N, 7, 3), "box": torch.randn(N, 7, 4)}, _classes(N, 7, count=3), ("['cls']", 2)),
    "labels of classes first": (torch.randn(N, 3, 7), _classes(N, 7, count=3), ("", 1)),
}


@pytest.mark.parametrize("name", SCORES)
def test_labels_in_the_data_show_which_output_and_axis_the_classes_are(name: str) -> None:
    outputs, data, expected = SCORES[name]
    assert _axis(outputs, data) == expected


OTHERS = {
    "a regression": (torch.randn(N, 3), (IMAGES, torch.randn(N, 3))),
    "a regression with a flag": (torch.randn(N, 2), (IMAGES, torch.randn(N, 2), _classes(N, count=2))),
    "a regression with numbers of samples": (torch.randn(N, 2), (IMAGES, torch.arange(N))),
    "a reconstruction": (torch.randn(N, 3, 8, 8), (IMAGES, _classes(N, count=3))),
    "several labels a sample": (torch.randn(N, 3), (IMAGES, torch.ones(N, 3))),
    "an embedding": (torch.randn(N, 64), (IMAGES, _classes(N, count=5))),
    "hidden states of tokens": (torch.randn(N, 7, 16), {"ids": torch.full((N, 7), 9000)}),
    "one score": (torch.randn(N, 1), (IMAGES, _classes(N, count=2))),
    "no labels": (torch.randn(N, 5), (IMAGES,)),
    "labels out of range": (torch.randn(N, 3), (IMAGES, _classes(N, count=4))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_has_the_shape_of_scores_has_no_top_1(name: str) -> None:
    outputs, data = OTHERS[name]
    assert _axis(outputs, data) is None


def test_pixels_that_count_for_nothing_have_one_label_in_all_calls() -> None:
    scores, data = torch.randn(N, 3, 4, 4), _classes(N, 4, 4, count=4)
    for later, expected in ((data, ("", 1)), (data.where(data < 3, 9), None)):
        found = ClassScores()
        for labels in (data, later):
            found.update({"": scores}, IMAGES, labels)
        assert found.axis == expected


def test_labels_of_few_classes_count_where_a_metric_knows_their_number() -> None:
    scores, data = torch.randn(N, 64), (IMAGES, _classes(N, count=5))
    assert _axis(scores, data, classes=(64,)) == ("", 1)
    assert _axis(scores, data, classes=(5,)) is None


def test_boxes_are_never_classes_though_once_there_are_as_many_as_labels() -> None:
    """Also without data, if there happen to be as many boxes as color channels."""
    detections = ClassScores(), ClassScores()
    images = [torch.rand(3, 8, 8), torch.rand(3, 8, 8)]
    for boxes in (3, 5, 2):
        found = [{"boxes": torch.rand(boxes, 4), "scores": torch.rand(boxes), "labels": torch.ones(boxes).long()}] * 2
        data = images, [{"boxes": torch.rand(3, 4), "labels": torch.tensor([1, 2, 3])}] * 2
        detections[0].update(outputs_by_path(found), images, data)
        detections[1].update(outputs_by_path(found), images)
    assert [scores.axis for scores in detections] == [None, None]


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (torch.randn(N, 5), ("", 1)),
        ({"aux": torch.randn(N), "logits": torch.randn(N, 5)}, ("['logits']", 1)),
        (torch.randn(N, 4, 8, 8), ("", 1)),
        (IMAGES.clone(), None),
        (torch.randn(N, 84, 20), None),
        (torch.randn(N + 1, 4), None),
    ],
)
def test_without_data_the_shapes_have_to_do(outputs: Any, expected: Any) -> None:
    assert _axis(outputs, None) == expected


def test_agreement_is_of_the_scores_and_not_of_the_first_output() -> None:
    boxes, scores = torch.rand(N, 4), torch.randn(N, 5)
    fidelity, worse = Fidelity(), -scores
    fidelity.data = {"x": IMAGES, "y": _classes(N, count=5)}
    fidelity.update((boxes, scores), (boxes.flip(1), scores), IMAGES, of="one")
    fidelity.update((boxes, scores), (boxes, worse), IMAGES, of="other")
    assert fidelity.compute()["agreement"] == 0.5
    without = Fidelity()
    without.data = (IMAGES,)
    without.update((boxes, scores), (boxes, scores), IMAGES)
    assert without.compute() == {"sqnr_db": float("inf")}
