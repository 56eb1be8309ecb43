"""Boxes in plain torch: overlap, suppression of duplicates, and which place of a detector learns which box.

A box is its left, upper, right and lower edge, in pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

REACH = 4.0
"""A level finds the boxes of whose longer side half is at most so many of its strides; the last one all larger ones."""

RADIUS = 1.5
"""Places this many strides from the centre of a box learn it, on either axis."""

LARGEST = 5.0
"""Logarithms of distances are held to this: 148 strides."""


class Detections(NamedTuple):
    """What was found in one image.

    Attributes:
        boxes: float32 of shape (K, 4), in pixels.
        scores: float32 of shape (K,), from 0 to 1, in falling order.
        labels: int64 of shape (K,), the classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Places(NamedTuple):
    """Where a detector looks: the places of all levels, one after the other.

    Attributes:
        points: float32 of shape (P, 2), x and y in pixels.
        strides: float32 of shape (P,), the pixels from one place to the next.
        levels: int64 of shape (P,), the level from 0.
    """

    points: Tensor
    strides: Tensor
    levels: Tensor


def area(boxes: Tensor) -> Tensor:
    """The area of boxes of shape (..., 4), of shape (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """The intersection over the union of each box with each other one.

    Args:
        boxes: Of shape (A, 4).
        others: Of shape (B, 4).

    Returns:
        From 0 to 1, of shape (A, B); 0 where both boxes are empty.

    Example:
        >>> overlaps(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2]]))
        tensor([[1.0000, 0.3333]])
    """
    both, either, _ = _regions(boxes[:, None], others[None])
    return both / either.clamp(min=torch.finfo(either.dtype).tiny)


def generalized_overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The intersection over the union of pairs of boxes, and the generalized one, which also has a gradient apart.

    The second is less by the share of the smallest box around both that neither covers: Rezatofighi et al., 2019,
    "Generalized Intersection over Union".

    Args:
        boxes: Of shape (..., 4).
        others: Of the same shape.

    Returns:
        From 0 to 1 and from -1 to 1, both of shape (...).

    Example:
        >>> generalized_overlap(torch.tensor([0.0, 0, 1, 1]), torch.tensor([3.0, 0, 4, 1]))
        (tensor(0.), tensor(-0.5000))
    """
    both, either, around = _regions(boxes, others)
    tiny = torch.finfo(either.dtype).tiny
    shared = both / either.clamp(min=tiny)
    return shared, shared - (around - either) / around.clamp(min=tiny)


def _regions(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The areas of the intersection, the union, and the smallest box around both."""
    inner = torch.cat(
        [torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])], -1
    )
    outer = torch.cat(
        [torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:])], -1
    )
    both = (inner[..., 2:] - inner[..., :2]).clamp(min=0).prod(-1)
    return both, area(boxes) + area(others) - both, area(outer)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Keep the best of boxes that overlap: greedy non-maximum suppression, for each class by itself.

    A box stays unless a better one of its class stays and overlaps it by more than the threshold. All boxes are judged
    at once by what stayed the time before, until nothing changes, as in Zheng et al., 2021, "Enhancing Geometric
    Factors in Model Learning and Inference for Object Detection and Instance Segmentation". The k best are settled
    after k times at the latest, so that the result is that of one box after the other.

    Args:
        boxes: Of shape (K, 4).
        scores: Of shape (K,).
        labels: Of shape (K,).
        threshold: Of the intersection over the union.

    Returns:
        Indices of those that stay, int64, best first.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [2, 0, 12, 10], [0, 0, 10, 10]])
        >>> suppress(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 0, 1]), 0.7)
        tensor([0, 2, 3])
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    better = (overlaps(boxes, boxes) > threshold) & (labels[:, None] == labels[None])
    better = better.triu(1)  # [i, j]: i is better than j, and in its way
    kept = torch.ones_like(order, dtype=torch.bool)
    while True:
        still = ~(better & kept[:, None]).any(0)
        if torch.equal(still, kept):
            return order[kept]
        kept = still


def places(sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | None = None) -> Places:
    """The places of all levels: the centres of their cells.

    Args:
        sizes: Height and width of each level, in places.
        strides: Pixels from one place to the next, of each level.
        device: Where the tensors are made.

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
    """Say which box each place learns, by the rules of Tian et al., 2019, "FCOS", with centre sampling.

    A box belongs to one level, by its longer side (`REACH`). The places of that level within the box learn it that are
    at most `RADIUS` strides from its centre, and in any case the one in whose cell the centre is. A place that could
    learn several takes the smallest.

    Args:
        where: P places.
        boxes: Of shape (N, M, 4), M at least 1.
        labels: int64 of shape (N, M); -1 where there is no box.

    Returns:
        int64 of shape (N, P): the index of the box, or -1 for background.

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
    """Compute boxes from a network's outputs.

    Args:
        where: P places.
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
    """Choose what to report of one image.

    Args:
        boxes: Of shape (P, 4).
        scores: From 0 to 1, of shape (P, C).
        score_threshold: What is not above is left out.
        iou_threshold: Of what overlaps more, the best is kept (`suppress`).
        max_detections: The most to keep.
        candidates: The most to suppress duplicates of, the best ones.

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
