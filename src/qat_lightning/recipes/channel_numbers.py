"""Channels with numbers: what makes them, what reads them, and how the numbers of a tensor are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Where = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Made:
    """A parameter, or a part of one, whose first dimension makes channels: dividing it divides them."""

    tensor: Tensor
    channels: Tensor

    def divide(self, factor: Tensor) -> None:
        """Divide by the factor of each channel, out of those of all channels."""
        own = factor[self.channels].to(self.tensor)
        self.tensor.div_(own.reshape(-1, 1) if self.tensor.dim() == 2 else own)


@dataclass(frozen=True, eq=False)
class Source:
    """What makes channels of its own.

    Attributes:
        name: Of its parameter.
        first: The number of its first channel.
        count: How many it has.
        made: Its parameters.
    """

    name: str
    first: int
    count: int
    made: list[Made]


@dataclass(frozen=True, eq=False)
class Follower:
    """A linear layer whose input channels are known.

    Attributes:
        name: Of its weight.
        weight: ``(outputs, inputs)``.
        channels: The number of each input channel.
        largest: The largest absolute value of each, in the run.
    """

    name: str
    weight: Tensor
    channels: Tensor
    largest: Tensor

    def multiply(self, factor: Tensor) -> None:
        """Multiply each input channel's weights by its factor, out of those of all channels."""
        self.weight.mul_(factor[self.channels].to(self.weight))


def where(tensor: Tensor) -> Where:
    """Which values a tensor holds: the place in memory, and how many."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


def thin(numbers: Tensor) -> Tensor:
    """Without the copies that an expanded dimension has."""
    for dim in range(numbers.dim()):
        if numbers.stride(dim) == 0 and numbers.shape[dim] > 1:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers


def distinct(numbers: Tensor) -> Iterator[int]:
    """The channels that there are."""
    found: list[int] = thin(numbers).unique().tolist()
    return (number for number in found if number >= 0)


def of_last_dim(numbers: Tensor) -> Tensor | None:
    """The numbers of the last dimension, if they are the same everywhere else."""
    if not numbers.dim():
        return None
    once = thin(numbers)
    rows = once.expand(*once.shape[:-1], numbers.shape[-1]).reshape(-1, numbers.shape[-1])
    return rows[0].long() if bool((rows == rows[0]).all()) else None
