"""Which output of a network is scores of classes: the only one of which a top-1 says something.

A box of four coordinates, an image of three colors and the scores of three classes look alike. What tells them apart is
the data: scores have a label for each row, an integer that is the place of a class. Without data, shapes have to do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from qat_lightning.graph.structures import look_into
from qat_lightning.measure.metrics import class_axis

Axis = tuple[str, int]
"""The path of an output, and which of its axes is that of the classes."""

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_SHAPE = "the shape"


@dataclass(frozen=True)
class _Labels:
    """What is known of the labels in one tensor of the data.

    Attributes:
        largest: The largest that is the place of a class; -1 if there was none.
        void: The label of places that count for nothing, in pixels and tokens; negative ones are as well.
    """

    largest: int
    void: int | None = None

    def and_in(self, other: _Labels | None) -> _Labels | None:
        """The same of two calls; None if they have no labels in common."""
        if other is None or (None not in (self.void, other.void) and self.void != other.void):
            return None
        return _Labels(max(self.largest, other.largest), other.void if self.void is None else self.void)


class ClassScores:
    """Finds the output that is scores of classes, from all calls of a network.

    With data, a label is an integer tensor of an output's shape without its class axis (for images also of another
    size), or a one-hot tensor of its shape, in every call. Its largest must be in the upper half of the classes, unless
    a metric knows their number: the labels of 10 classes are no places in an embedding of 64.

    Without data it is the first output with a class axis by its shape (see
    `qat_lightning.measure.metrics.class_axis`), that has a row for each sample of an input, and no input's shape.

    Args:
        numbers: Numbers of classes of the LightningModule's metrics.

    Example:
        >>> found, boxes = ClassScores(), torch.tensor([[0.0, 0.0, 9.0, 9.0], [2.0, 2.0, 5.0, 5.0]])
        >>> outputs = {"['boxes']": boxes, "['logits']": torch.eye(2)}
        >>> _ = found.update(outputs, torch.zeros(2, 3), {"x": torch.zeros(2, 3), "y": torch.tensor([1, 0])})
        >>> found.axis
        ("['logits']", 1)
    """

    def __init__(self, numbers: Collection[int] = ()) -> None:
        self._numbers = frozenset(numbers)
        self._candidates: dict[Axis, _Candidate] = {}
        self._calls = 0

    def update(self, outputs: Mapping[str, Tensor], inputs: Any = (), data: Any = None) -> list[Axis]:
        """Take a call into account.

        Args:
            outputs: Outputs of the network, by path.
            inputs: It was called with them, in any structure.
            data: The batch that the call is from, in any structure; None if there is none.

        Returns:
            What may be scores of classes, as far as is known.
        """
        given = list(_tensors(inputs).values())
        labelled = data is not None
        found: dict[Axis, dict[str, _Labels]] = {}
        known = _tensors(data) | _tensors(inputs, "inputs") if labelled else {}
        for path, output in outputs.items():
            if output.dim() < 2 or not output.is_floating_point():
                continue
            if labelled:
                found |= {(path, axis): _labels(output, axis, known, given) for axis in range(1, output.dim())}
            elif (axis := _by_shape(output, inputs, given)) is not None:
                found[path, axis] = {_SHAPE: _Labels(output.size(axis) - 1)}
        for key, labels in found.items():
            self._candidates.setdefault(key, _Candidate(outputs[key[0]].size(key[1]), self._calls)).take(labels)
        self._calls += 1
        return [key for key in found if self._candidates[key].holds(self._calls)]

    @property
    def axis(self) -> Axis | None:
        """The first output that is scores of classes in all calls, and its class axis; None if none is."""
        for key, candidate in self._candidates.items():
            if candidate.holds(self._calls) and (candidate.classes in self._numbers or candidate.is_covered):
                return key
        return None


@dataclass
class _Candidate:
    """What may be scores of classes.

    Attributes:
        classes: How many.
        calls: In how many calls it was.
        labels: Its labels in all of them, by the path of the tensor in the data.
    """

    classes: int
    calls: int
    labels: dict[str, _Labels] = field(default_factory=dict)

    def take(self, labels: Mapping[str, _Labels]) -> None:
        """Take the labels of another call into account."""
        if self.calls:
            both = {name: before.and_in(labels.get(name)) for name, before in self.labels.items()}
            labels = {name: found for name, found in both.items() if found is not None}
        self.labels = dict(labels)
        self.calls += 1

    def holds(self, calls: int) -> bool:
        """Whether it had labels in that many calls."""
        return self.calls == calls and bool(self.labels)

    @property
    def is_covered(self) -> bool:
        return any(2 * (labels.largest + 1) > self.classes for labels in self.labels.values())


def _tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    look_into(value)
    leaves, _ = tree_flatten_with_path(value)
    return {prefix + keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _by_shape(output: Tensor, inputs: Any, given: list[Tensor]) -> int | None:
    axis = class_axis(output, inputs)
    if axis is None or (output.dim() == 3 and axis == 1):
        return None
    if given and not any(tensor.dim() and tensor.size(0) == output.size(0) for tensor in given):
        return None
    return None if any(tensor.shape == output.shape for tensor in given) else axis


def _labels(output: Tensor, axis: int, data: Mapping[str, Tensor], inputs: list[Tensor]) -> dict[str, _Labels]:
    """The tensors that may hold the labels of an output."""
    if output.size(axis) < 2 or (output.dim() == 2 and _is_target(output, axis, data, inputs)):
        return {}
    found = {name: _labels_in(tensor, output, axis) for name, tensor in data.items()}
    return {name: labels for name, labels in found.items() if labels is not None}


def _is_target(output: Tensor, axis: int, data: Mapping[str, Tensor], inputs: list[Tensor]) -> bool:
    """Whether the data has numbers for each of an output, which is a regression's then."""
    if any(tensor.shape == output.shape for tensor in inputs):
        return False
    return any(
        tensor.is_floating_point() and tensor.shape == output.shape and not _is_one_hot(tensor, axis)
        for tensor in data.values()
    )


def _labels_in(tensor: Tensor, output: Tensor, axis: int) -> _Labels | None:
    if tensor.shape == output.shape:
        return _Labels(int(tensor.argmax(axis).max())) if _is_one_hot(tensor, axis) else None
    if tensor.dtype not in _WHOLE or not tensor.numel() or not _fits(tensor.shape, output.shape, axis):
        return None
    inside = (tensor >= 0) & (tensor < output.size(axis))
    beyond = tensor[tensor >= output.size(axis)].unique()
    if beyond.numel() > (tensor.dim() > 1):
        return None
    largest = int(tensor[inside].max()) if bool(inside.any()) else -1
    return _Labels(largest, int(beyond) if beyond.numel() else None)


def _fits(labels: torch.Size, scores: torch.Size, axis: int) -> bool:
    """Whether labels have the shape of scores without their class axis, or with one of size 1 in its place."""
    without, single = (*scores[:axis], *scores[axis + 1 :]), (*scores[:axis], 1, *scores[axis + 1 :])
    if tuple(labels) in (without, single):
        return True
    resized = len(scores) >= 4 and axis == 1 and labels[0] == scores[0]
    return resized and (len(labels) == len(scores) - 1 or (len(labels) == len(scores) and labels[1] == 1))


def _is_one_hot(tensor: Tensor, axis: int) -> bool:
    if tensor.is_complex() or not tensor.numel():
        return False
    return bool(((tensor == 0) | (tensor == 1)).all()) and bool((tensor.sum(axis) == 1).all())
