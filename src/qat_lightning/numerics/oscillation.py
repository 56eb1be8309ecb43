"""Weights that oscillate between two integers of their grid: how often each does, and where it is frozen.

Nagel et al., 2022, https://arxiv.org/abs/2203.11086: the gradient of the straight-through estimator pushes a latent
weight that lies near the middle between two integers over it and back, step after step, for as long as it trains.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

OSCILLATES = 0.005
"""The frequency from which on a weight counts as oscillating: one reversal in 200 steps (section 2.3 of the paper)."""


class Oscillation:
    """What is known of the integers of one weight tensor over the steps of a training.

    All tensors have the shape of the weight as its grid sees it.

    Args:
        integers: Those of now, whole numbers of any dtype. What is frozen goes by whole numbers, not by values, so that
            a scale that moves changes no rounding.

    Attributes:
        integers: int16; where ``frozen``, for good.
        direction: int8: the sign of the last change of each integer; 0 before the first.
        frequency: float32: the moving average of how often a change reverses the one before (equation 5).
        average: float32: the moving average of the integers, whose nearest one is frozen.
        frozen: bool.

    Example:
        >>> state = Oscillation(torch.tensor([2.0, 5.0]))
        >>> for first in (3.0, 2.0, 3.0, 3.0, 3.0, 3.0):
        ...     state.observe(torch.tensor([first, 5.0]), momentum=0.1)
        >>> state.freeze(0.1)
        >>> state.frozen.tolist(), state.integers.tolist()
        ([True, False], [2, 5])
    """

    NAMES = ("integers", "direction", "frequency", "average", "frozen")
    """The attributes, which are all that a checkpoint needs to hold."""

    integers: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor

    def __init__(self, integers: Tensor) -> None:
        self.integers = integers.to(torch.int16)
        self.direction = torch.zeros_like(self.integers, dtype=torch.int8)
        self.frequency = torch.zeros_like(self.integers, dtype=torch.float32)
        self.average = self.integers.float()
        self.frozen = torch.zeros_like(self.integers, dtype=torch.bool)

    @torch.no_grad()
    def observe(self, integers: Tensor, momentum: float) -> None:
        """Take the integers after one more step into account (algorithm 1 of the paper).

        Args:
            integers: Of the present weight; those that are frozen stay what they are.
            momentum: The weight of this step in both averages.
        """
        now = torch.where(self.frozen, self.integers, integers.to(torch.int16))
        turned = torch.sign(now - self.integers).to(torch.int8)
        reverses = (turned * self.direction) < 0
        self.frequency.mul_(1 - momentum).add_(reverses, alpha=momentum)
        self.average.mul_(1 - momentum).add_(now, alpha=momentum)
        self.direction = torch.where(turned != 0, turned, self.direction)
        self.integers = now

    @torch.no_grad()
    def freeze(self, threshold: float, inside: tuple[Tensor, Tensor] | None = None) -> None:
        """Freeze the weights that oscillate more often than that, each at the integer that its average is nearest to.

        Args:
            threshold: A frequency, from 0 to 1.
            inside: The smallest and the largest integer between which, themselves excluded, weights may be frozen, of
                any shape that goes with the weight's; None for all integers. A weight at an end of a grid that is made
                from the weights themselves decides that grid.
        """
        new = (self.frequency > threshold) & ~self.frozen
        wanted = self.average.round().to(torch.int16)
        if inside is not None:
            for integers in (self.integers, wanted):
                new &= (integers > inside[0]) & (integers < inside[1])
        self.integers = torch.where(new, wanted, self.integers)
        self.frozen |= new

    def counts(self) -> tuple[Tensor, Tensor]:
        """How many weights oscillate, and how many are frozen; the latter do not oscillate any more."""
        return ((self.frequency > OSCILLATES) & ~self.frozen).sum(), self.frozen.sum()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state_dict`, on the device that the tensors here are on.

        Raises:
            ValueError: A tensor is missing, or has another shape.
        """
        for name in self.NAMES:
            own, given = getattr(self, name), state.get(name)
            if given is None or given.shape != own.shape:
                raise ValueError(f"{name!r} has the shape {tuple(own.shape)} here and belongs to another weight there")
        for name in self.NAMES:
            own = getattr(self, name)
            setattr(self, name, state[name].to(device=own.device, dtype=own.dtype).clone())
