"""Finding channels that can be rotated together, by one run in which each channel has a number.

A linear layer reads channels and produces others, an embedding produces some, and a residual addition makes channels of
two producers equal. A norm commutes with a rotation once its scale is folded into the weights that read it: RMSNorm
with every rotation, LayerNorm with those that preserve the mean. Attention mixes positions, so the channels of one head
can be rotated. Any other reader (a GELU, a gate, rotary positions) makes channels stuck.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from qat_lightning.modes.eager.observation import function_name
from qat_lightning.recipes.channel_numbers import Where, distinct, thin, where
from qat_lightning.recipes.numbered_run import Handler, NumberedRun

MEANS = frozenset({"mean", "sum"})


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of a parameter, or of a part of one, that corresponds to channels.

    Attributes:
        tensor: The parameter or the part.
        dim: The dimension.
        numbers: Numbers of its channels.
    """

    tensor: Tensor
    dim: int
    numbers: Tensor


@dataclass(frozen=True, eq=False)
class Read:
    """A linear layer that reads channels.

    Attributes:
        name: Name of its weight.
        weight: ``(outputs, inputs)``, the parameter or a view of it.
        bias: The bias, or None.
        numbers: Numbers of its input channels.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    numbers: Tensor


@dataclass(frozen=True, eq=False)
class Scaled:
    """A norm, or a multiplication by a scale per channel in the network's code.

    Attributes:
        name: Name of its scale; without one, the kind of norm.
        scale: One value per channel; None for none.
        shift: One value per channel; None for none.
        numbers: Numbers of the output channels, which are rotated like the input channels.
        centred: Whether it subtracts the mean.
    """

    name: str
    scale: Tensor | None
    shift: Tensor | None
    numbers: Tensor
    centred: bool

    @property
    def plain(self) -> bool:
        """Whether there is nothing to fold: all scales are 1 and all shifts 0."""
        scaled = self.scale is not None and not bool((self.scale == 1).all())
        return not scaled and (self.shift is None or not bool(self.shift.any()))


class Spaces(NumberedRun):
    """The channels of one run of a network; see `qat_lightning.recipes.space_rules.follow_spaces`.

    Attributes:
        axes: Dimensions of parameters that correspond to channels.
        reads: The linear layers, in execution order.
        scaled: The norms, in execution order.
        pairs: Numbers of channels that are equal, ``(2, count)`` each.
        rows: Numbers of channels that are stored or read together.
        elsewhere: Numbers of channels after a norm with a reader into which its scale cannot be folded, and that
            reader.
        unknown: Linear layers whose input cannot be rotated, and its producer.
    """

    handlers: ClassVar[tuple[tuple[frozenset[str], Handler], ...]]

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.axes: list[Axis] = []
        self.reads: list[Read] = []
        self.scaled: list[Scaled] = []
        self.pairs: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.elsewhere: dict[int, str] = {}
        self.unknown: dict[str, str] = {}
        self._first: dict[Where, tuple[Tensor, Axis]] = {}
        self.squares = WeakTensorKeyDictionary()
        for parameter in network.parameters():
            if parameter.dim() and parameter.is_floating_point():
                self.know(parameter, self._new_axis(parameter, -1).numbers.expand(parameter.shape))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Squares of channels may be used for means of squares only."""
        leaves = tree_leaves((args, kwargs or {}))
        squares = [self.squares[leaf] for leaf in leaves if isinstance(leaf, Tensor) and leaf in self.squares]
        result = super().__torch_function__(func, types, args, kwargs)
        name = function_name(func)
        if squares and name is not None and name not in MEANS:
            for numbers in squares:
                self.stick(numbers, name)
        return result

    def _new_axis(self, tensor: Tensor, dim: int) -> Axis:
        axis = Axis(tensor, dim, self.new_numbers(tensor.shape[dim]))
        self.axes.append(axis)
        self.rows.append(axis.numbers)
        return axis

    def first_dim(self, weight: Tensor) -> Tensor:
        """The numbers of the channels in the first dimension of a parameter, or of a part of one."""
        found = self._first.get(where(weight))
        if found is None:
            found = self._first[where(weight)] = weight, self._new_axis(weight, 0)
        return found[1].numbers

    def unify(self, one: Tensor, other: Tensor) -> None:
        """Mark channels as equal, value by value."""
        left, right = (part.flatten().long() for part in torch.broadcast_tensors(thin(one), thin(other)))
        known = (left >= 0) & (right >= 0)
        for numbers in (left[~known], right[~known]):
            self.stick(numbers, "a concatenation")
        both = (left[known] * self.count + right[known]).unique()
        self.pairs.append(torch.stack([both // self.count, both % self.count]))

    def row(self, numbers: Tensor) -> Tensor | None:
        """The numbers of the last dimension; those that differ between positions (after concatenation) become equal."""
        once = thin(numbers)
        rows = once.expand(*once.shape[:-1], numbers.shape[-1]).reshape(-1, numbers.shape[-1])
        if bool((rows < 0).any()):
            self.stick(numbers, "a concatenation")
            return None
        if bool((rows != rows[0]).any()):
            self.read_plain(numbers, "a concatenation")
            self.unify(rows, rows[:1])
        return rows[0].long()

    def read_plain(self, numbers: Tensor, reader: str) -> None:
        """Mark channels as read by something into which no scale of a norm can be folded."""
        for number in distinct(numbers):
            self.elsewhere.setdefault(number, reader)

    def scale(self, name: str, row: Tensor, parts: tuple[Tensor | None, Tensor | None], centred: bool) -> Tensor:
        """Pass channels through a norm; returns the numbers of its output channels."""
        out = self.new_numbers(row.numel())
        self.unify(row, out)
        self.rows.append(row)
        self.scaled.append(Scaled(name, *parts, out, centred))
        return out

    def finish(self, result: Any) -> None:
        """Mark the network's result as stuck, and parameters that are read both as a whole and in parts."""
        self.stick_results(result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf in self.squares:
                self.stick(self.squares[leaf], "the network's result")
        parts = sorted(self._first)
        for one, other in pairwise(parts):
            if one[0] == other[0] and one[1] + one[2] > other[1]:
                self._stick_weight(one)
                self._stick_weight(other)

    def _stick_weight(self, key: Where) -> None:
        why = "a weight that is read as a whole and in parts"
        self.stick(self._first[key][1].numbers, why)
        for read in self.reads:
            if where(read.weight) == key:
                self.stick(read.numbers, why)
