"""Deriving from a run which channels are rotated by which matrix, and rotating the parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qat_lightning.recipes.hadamard import rotation
from qat_lightning.recipes.spaces import Axis, Read, Scaled, Spaces


def labels_of(count: int, pairs: Iterable[Tensor]) -> Tensor:
    """For each number the smallest one that is equal to it, given pairs of equal numbers; ``(count,)``, int64.

    Example:
        >>> labels_of(5, [torch.tensor([[1, 2], [2, 4]])]).tolist()
        [0, 1, 1, 3, 1]
    """
    labels = torch.arange(count)
    both = torch.cat(list(pairs), 1) if pairs else torch.zeros(2, 0, dtype=torch.long)
    while True:
        least = torch.minimum(labels[both[0]], labels[both[1]])
        new = labels.scatter_reduce(0, both[0], least, "amin").scatter_reduce(0, both[1], least, "amin")
        new = new[new]
        if torch.equal(new, labels):
            return labels
        labels = new


_LEAST_SCALE = 0.01
"""Smallest scale of a norm, relative to its largest, by which its shift may be divided if no bias can take it."""


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are rotated together.

    Attributes:
        members: Labels of the channels, in order.
        matrix: ``(channels, channels)``, orthogonal, float64.
    """

    members: Tensor
    matrix: Tensor


class Plan:
    """The rotations of a network; created by `plan`.

    Args:
        run: The recorded run.
        labels: The same number for channels that are equal.
        stuck: Labels of channels that are not rotated, and why.
        groups: Groups of channels that are rotated.

    Attributes:
        components: For each group a number; groups that pass through the same norm have the same one, because they can
            only be rotated together.
    """

    def __init__(self, run: Spaces, labels: Tensor, stuck: dict[int, str], groups: list[Group]) -> None:
        self._run, self._labels, self._stuck, self._groups = run, labels, stuck, groups
        self._group_of = torch.full((run.count,), -1)
        for index, group in enumerate(groups):
            self._group_of[group.members] = index
        pairs = []
        for norm in run.scaled:
            own = self._groups_in(norm.numbers)
            own = own[own >= 0]
            pairs.append(torch.stack([own, own[:1].expand_as(own)]))
        self._component = labels_of(len(groups), pairs)
        self.components: list[int] = self._component.unique().tolist()

    def _groups_in(self, numbers: Tensor) -> Tensor:
        """The group of each channel; -1 for none."""
        return self._group_of[self._labels[numbers.long()]]

    def leave(self, component: int, why: str) -> None:
        """Do not rotate the groups of a component."""
        self.components.remove(component)
        for index in (self._component == component).nonzero().flatten().tolist():
            self._stuck.update(dict.fromkeys(self._groups[index].members.tolist(), why))

    def of_read(self, read: Read) -> tuple[int, str]:
        """How many input channels of a layer are rotated together; if none, the reason why."""
        for index in self._groups_in(read.numbers).unique().tolist():
            if index >= 0 and int(self._component[index]) in self.components:
                return self._groups[index].members.numel(), ""
        label = int(self._labels[read.numbers[0]])
        return 0, self._stuck.get(label, "its channels stand alone")

    def apply(self, which: list[int] | None = None) -> None:
        """Rotate the parameters in place, for all components or the given ones."""
        chosen = set(self.components if which is None else which)
        rotated = [int(self._component[index]) in chosen for index in range(len(self._groups))]
        for norm in self._run.scaled:
            group = int(self._groups_in(norm.numbers).max())
            if not norm.plain and group >= 0 and rotated[group]:
                self._fold(norm)
        for axis in self._run.axes:
            self._rotate_axis(axis, [index for index, chosen in enumerate(rotated) if chosen])

    def _fold(self, norm: Scaled) -> None:
        """Fold scale and shift of a norm into the layers that read it.

        If one of them has no bias of its own, the shift stays, divided by the scale, and is rotated.
        """
        readers = _readers(norm, self._run)
        stays = norm.shift is not None and not all(_takes_shift(read, self._run) for read, _ in readers)
        for read, at in readers:
            own = read.numbers[at] - int(norm.numbers[0])
            weight = read.weight[:, at].double()
            if norm.shift is not None and not stays and read.bias is not None:
                read.bias.add_((weight @ norm.shift[own].double()).to(read.bias))
            if norm.scale is not None:
                read.weight[:, at] = (weight * norm.scale[own].double()).to(read.weight)
        if norm.shift is not None and stays:
            norm.shift.div_(1 if norm.scale is None else norm.scale)
            self._rotate_axis(Axis(norm.shift, 0, norm.numbers), self._groups_in(norm.numbers).unique().tolist())
        elif norm.shift is not None:
            norm.shift.zero_()
        if norm.scale is not None:
            norm.scale.fill_(1)

    def _rotate_axis(self, axis: Axis, which: list[int]) -> None:
        groups = self._groups_in(axis.numbers)
        for index in groups.unique().tolist():
            if index >= 0 and index in which:
                self._rotate(axis, self._groups[index], groups == index)

    def _rotate(self, axis: Axis, group: Group, own: Tensor) -> None:
        """Rotate one dimension of a parameter; heads that several queries share occur several times."""
        places = own.nonzero().flatten()
        rank = torch.searchsorted(group.members, self._labels[axis.numbers[places].long()])
        places = places[rank.argsort(stable=True)].reshape(group.members.numel(), -1).t()
        moved = axis.tensor.movedim(axis.dim, -1)
        moved[..., places] = (moved[..., places].double() @ group.matrix.to(moved.device)).to(moved.dtype)


def _readers(norm: Scaled, run: Spaces) -> list[tuple[Read, Tensor]]:
    """The linear layers that read the output of a norm, each with the positions of the input channels concerned."""
    first, count = int(norm.numbers[0]), norm.numbers.numel()
    places = [((read.numbers >= first) & (read.numbers < first + count)).nonzero().flatten() for read in run.reads]
    return [(read, at) for read, at in zip(run.reads, places, strict=True) if at.numel()]


def _takes_shift(read: Read, run: Spaces) -> bool:
    """Whether a layer has a bias of its own."""
    return read.bias is not None and run.used_once(read.bias)


def plan(run: Spaces) -> Plan:
    """Find the largest groups of channels that can be rotated.

    Channels belong together if they are always stored and read together. If a norm's scale cannot be folded into its
    readers, its channels are not rotated.
    """
    labels = labels_of(run.count, run.pairs)
    stuck: dict[int, str] = {}
    for number in sorted(run.stuck):
        stuck.setdefault(int(labels[number]), run.stuck[number])
    for norm in run.scaled:
        why = "" if norm.plain else _cannot_fold(norm, run)
        if why:
            for label in labels[norm.numbers.long()].tolist():
                stuck.setdefault(label, why)
    _stick_whole_norms(run, labels, stuck)
    centred = {label for norm in run.scaled if norm.centred for label in labels[norm.numbers.long()].tolist()}
    read = {label for one in run.reads for label in labels[one.numbers].tolist()}
    groups = []
    for members in _together(run, labels, stuck):
        if len(members) > 1 and members[0] in read:
            matrix = rotation(len(members), keeps_ones=members[0] in centred)
            groups.append(Group(torch.tensor(members), matrix))
    return Plan(run, labels, stuck, groups)


def _together(run: Spaces, labels: Tensor, stuck: dict[int, str]) -> Iterable[list[int]]:
    """Labels grouped by the rows that contain them."""
    rows: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(run.rows):
        for label in labels[row.long()].tolist():
            if label not in stuck:
                rows[label].append(index)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for label in sorted(rows):
        groups[tuple(rows[label])].append(label)
    return groups.values()


def _stick_whole_norms(run: Spaces, labels: Tensor, stuck: dict[int, str]) -> None:
    """The scale of a norm is folded for all of its channels or for none."""
    rows = [labels[norm.numbers.long()].tolist() for norm in run.scaled if not norm.plain]
    changed = True
    while changed:
        changed = False
        for row in rows:
            why = next((stuck[label] for label in row if label in stuck), None)
            if why is not None and any(label not in stuck for label in row):
                changed = True
                for label in row:
                    stuck.setdefault(label, why)


def _cannot_fold(norm: Scaled, run: Spaces) -> str:
    """Why scale and shift of a norm cannot be folded into its readers; empty if they can."""
    first, count = int(norm.numbers[0]), norm.numbers.numel()
    why = next((run.elsewhere[n] for n in range(first, first + count) if n in run.elsewhere), None)
    if why is not None:
        return f"{why} reads what {norm.name} scales"
    if any(part is not None and not run.used_once(part) for part in (norm.scale, norm.shift)):
        return f"{norm.name} is read in several places"
    readers = [read for read, _ in _readers(norm, run)]
    for read in readers:
        if not run.used_once(read.weight):
            return f"{read.name} is read in several places, and {norm.name} scales in one"
    shifted = norm.shift is not None and bool(norm.shift.any())
    if shifted and not all(_takes_shift(read, run) for read in readers) and not _divides(norm.scale):
        return f"a layer behind {norm.name} has no bias for its shift, and some of its scales are nearly 0"
    return ""


def _divides(scale: Tensor | None) -> bool:
    """Whether division by every scale is numerically safe."""
    return scale is None or bool((scale.abs() > _LEAST_SCALE * scale.abs().max()).all())
