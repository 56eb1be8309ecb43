"""Numbered channels: their producers, their readers, and helpers for numbers of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Where = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Made:
    """A parameter, or a part of one, whose first dimension produces channels: dividing it divides them."""

    tensor: Tensor
    channels: Tensor

    def divide(self, factor: Tensor) -> None:
        """Divide by the factor of each channel, taken from those of all channels."""
        own = factor[self.channels].to(self.tensor)
        self.tensor.div_(own.reshape(-1, 1) if self.tensor.dim() == 2 else own)


@dataclass(frozen=True, eq=False)
class Source:
    """A producer of channels.

    Attributes:
        name: Name of its parameter.
        first: Number of its first channel.
        count: Number of channels.
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
        name: Name of its weight.
        weight: ``(outputs, inputs)``.
        channels: The number of each input channel.
        largest: Largest absolute value of each channel in the run.
    """

    name: str
    weight: Tensor
    channels: Tensor
    largest: Tensor

    def multiply(self, factor: Tensor) -> None:
        """Multiply the weights of each input channel by its factor, taken from those of all channels."""
        self.weight.mul_(factor[self.channels].to(self.weight))


def where(tensor: Tensor) -> Where:
    """A key for the values of a tensor: the address in memory, and their number."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


def thin(numbers: Tensor) -> Tensor:
    """Remove the repetitions of expanded dimensions."""
    for dim in range(numbers.dim()):
        if numbers.stride(dim) == 0 and numbers.shape[dim] > 1:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers


def distinct(numbers: Tensor) -> Iterator[int]:
    """The distinct channels."""
    found: list[int] = thin(numbers).unique().tolist()
    return (number for number in found if number >= 0)


def of_last_dim(numbers: Tensor) -> Tensor | None:
    """The numbers of the last dimension, if they are the same at all other positions."""
    if not numbers.dim():
        return None
    once = thin(numbers)
    rows = once.expand(*once.shape[:-1], numbers.shape[-1]).reshape(-1, numbers.shape[-1])
    return rows[0].long() if bool((rows == rows[0]).all()) else None
