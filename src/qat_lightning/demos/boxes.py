"""Boxes in plain torch: IoU, non-maximum suppression, and assignment of boxes to a detector's locations.

A box consists of its left, upper, right and lower edge, in pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

REACH = 4.0
"""Longest half side of a box on each level, in strides of that level; the last level also takes larger boxes."""

RADIUS = 1.5
"""Locations within this many strides of a box's center, on each axis, are assigned to it."""

LARGEST = 5.0
"""Upper bound for logarithms of distances: 148 strides."""


class Detections(NamedTuple):
    """Detected objects in one image.

    Attributes:
        boxes: float32 of shape (K, 4), in pixels.
        scores: float32 of shape (K,), from 0 to 1, in descending order.
        labels: int64 of shape (K,), the classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Places(NamedTuple):
    """A detector's locations, for all levels in order.

    Attributes:
        points: float32 of shape (P, 2), x and y in pixels.
        strides: float32 of shape (P,), the pixels between neighboring locations.
        levels: int64 of shape (P,), the level from 0.
    """

    points: Tensor
    strides: Tensor
    levels: Tensor


def area(boxes: Tensor) -> Tensor:
    """Return the area, of shape (...), of boxes of shape (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union (IoU) of each pair of boxes.

    Args:
        boxes: Boxes of shape (A, 4).
        others: Boxes of shape (B, 4).

    Returns:
        IoU from 0 to 1, of shape (A, B); 0 if both boxes are empty.

    Example:
        >>> overlaps(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2]]))
        tensor([[1.0000, 0.3333]])
    """
    both, either, _ = _regions(boxes[:, None], others[None])
    return both / either.clamp(min=torch.finfo(either.dtype).tiny)


def generalized_overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the IoU and the generalized IoU of pairs of boxes; the latter has a gradient even without overlap.

    The generalized IoU subtracts the share of the smallest enclosing box that neither box covers: Rezatofighi et al.,
    2019, "Generalized Intersection over Union".

    Args:
        boxes: Boxes of shape (..., 4).
        others: Boxes of the same shape.

    Returns:
        IoU from 0 to 1 and generalized IoU from -1 to 1, both of shape (...).

    Example:
        >>> generalized_overlap(torch.tensor([0.0, 0, 1, 1]), torch.tensor([3.0, 0, 4, 1]))
        (tensor(0.), tensor(-0.5000))
    """
    both, either, around = _regions(boxes, others)
    tiny = torch.finfo(either.dtype).tiny
    shared = both / either.clamp(min=tiny)
    return shared, shared - (around - either) / around.clamp(min=tiny)


def _regions(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the areas of the intersection, the union, and the smallest enclosing box."""
    inner = torch.cat(
        [torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])], -1
    )
    outer = torch.cat(
        [torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:])], -1
    )
    both = (inner[..., 2:] - inner[..., :2]).clamp(min=0).prod(-1)
    return both, area(boxes) + area(others) - both, area(outer)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression, per class.

    A box is kept unless a kept box of its class has a higher score and overlaps it by more than the threshold. All
    boxes are updated at once from the previous iteration until nothing changes, as in Zheng et al., 2021, "Enhancing
    Geometric Factors in Model Learning and Inference for Object Detection and Instance Segmentation". The k best boxes
    are final after at most k iterations, so the result equals that of the sequential algorithm.

    Args:
        boxes: Boxes of shape (K, 4).
        scores: Scores of shape (K,).
        labels: Classes of shape (K,).
        threshold: IoU threshold.

    Returns:
        Indices of the kept boxes, int64, best first.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [2, 0, 12, 10], [0, 0, 10, 10]])
        >>> suppress(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 0, 1]), 0.7)
        tensor([0, 2, 3])
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    better = (overlaps(boxes, boxes) > threshold) & (labels[:, None] == labels[None])
    better = better.triu(1)  # [i, j]: i has a higher score than j, and suppresses it
    kept = torch.ones_like(order, dtype=torch.bool)
    while True:
        still = ~(better & kept[:, None]).any(0)
        if torch.equal(still, kept):
            return order[kept]
        kept = still


def places(sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | None = None) -> Places:
    """Return the locations of all levels: the centers of their cells.

    Args:
        sizes: Height and width of each level, in cells.
        strides: Pixels between neighboring locations, for each level.
        device: Device of the tensors.

    Example:
        >>> places([(1, 2), (1, 1)], (8, 16)).points.tolist()
        [[4.0, 4.0], [12.0, 4.0], [8.0, 8.0]]
    """
    points, steps, levels = [], [], []
    for level, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True)):
        rows = (torch.arange(height, device=device) + 0.5) * stride
        columns = (torch.arange(width, device=device) + 0.5) * stride
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points.append(torch.stack([x, y], -1).view(-1, 2))
        steps.append(torch.full((height * width,), float(stride), device=device))
        levels.append(torch.full((height * width,), level, device=device))
    return Places(torch.cat(points), torch.cat(steps), torch.cat(levels))


def assign(where: Places, boxes: Tensor, labels: Tensor) -> Tensor:
    """Assign boxes to locations by the rules of Tian et al., 2019, "FCOS", with center sampling.

    A box belongs to one level, by its longer side (`REACH`). It is assigned to the locations of that level that are
    within the box and at most `RADIUS` strides from its center, and always to the one whose cell contains the center. A
    location with several candidates gets the smallest box.

    Args:
        where: P locations.
        boxes: Boxes of shape (N, M, 4), M at least 1.
        labels: int64 of shape (N, M); -1 where there is no box.

    Returns:
        Index of the box, int64 of shape (N, P); -1 for background.

    Example:
        >>> where = places([(2, 2), (1, 1)], (8, 16))
        >>> assign(where, torch.tensor([[[1.0, 1, 7, 7]]]), torch.tensor([[2]]))
        tensor([[ 0, -1, -1, -1, -1]])
    """
    centres, halves = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    steps = where.strides[None, :, None, None]
    offsets = (where.points[None, :, None] - centres[:, None]).abs()  # (N, P, M, 2)
    near = (offsets <= torch.minimum(RADIUS * steps, torch.maximum(halves[:, None], steps / 2))).all(-1)
    ends = REACH * torch.unique(where.strides)[:-1]
    level = torch.bucketize(halves.amax(-1), ends)
    possible = near & (where.levels[None, :, None] == level[:, None]) & (labels >= 0)[:, None]
    sizes = area(boxes)[:, None].masked_fill(~possible, torch.inf)
    smallest, chosen = sizes.min(-1)
    return chosen.masked_fill(smallest.isinf(), -1)


def decode(where: Places, distances: Tensor) -> Tensor:
    """Compute boxes from the network's distances.

    Args:
        where: P locations.
        distances: Logarithms of the distances to the left, upper, right and lower edge in strides, of shape (N, P, 4).

    Returns:
        Boxes of shape (N, P, 4).

    Example:
        >>> decode(places([(1, 1)], (8,)), torch.zeros(1, 1, 4))
        tensor([[[-4., -4., 12., 12.]]])
    """
    edges = distances.clamp(max=LARGEST).exp() * where.strides[:, None]
    return torch.cat([where.points - edges[..., :2], where.points + edges[..., 2:]], -1)


def best_boxes(
    boxes: Tensor,
    scores: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    candidates: int = 400,
) -> Detections:
    """Return the detections of one image.

    Args:
        boxes: Boxes of shape (P, 4).
        scores: Scores from 0 to 1, of shape (P, C).
        score_threshold: Boxes with lower or equal scores are dropped.
        iou_threshold: IoU threshold of `suppress`.
        max_detections: Maximum number of detections.
        candidates: Maximum number of boxes before suppression; the best are used.

    Example:
        >>> boxes, scores = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]]), torch.tensor([[0.1, 0.9], [0.2, 0.7]])
        >>> found = best_boxes(boxes, scores, score_threshold=0.15, iou_threshold=0.5, max_detections=9)
        >>> found.labels.tolist(), found.boxes[1].tolist()
        ([1, 0], [0.0, 0.0, 9.0, 8.0])
    """
    flat = scores.flatten()
    best, indices = flat.topk(min(candidates, len(flat)))
    indices = indices[best > score_threshold]
    which, labels = indices // scores.shape[1], indices % scores.shape[1]
    boxes, chosen = boxes[which], flat[indices]
    kept = suppress(boxes, chosen, labels, iou_threshold)[:max_detections]
    return Detections(boxes[kept], chosen[kept], labels[kept])
