"""Weights that oscillate between two integers of their grid: how often each does, and where it is frozen.

Nagel et al., 2022, https://arxiv.org/abs/2203.11086: the gradient of the straight-through estimator pushes a latent
weight near the middle between two integers across it and back, step after step, as long as training lasts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

OSCILLATES = 0.005
"""The frequency above which a weight counts as oscillating: one reversal in 200 steps (section 2.3 of the paper)."""


class Oscillation:
    """Statistics of the integers of one weight tensor over the steps of a training.

    All tensors have the shape in which the grid sees the weight.

    Args:
        integers: The current integers, whole numbers of any dtype. Weights are frozen at integers rather than values,
            so a change of the scale does not change the rounding.

    Attributes:
        integers: int16: integers of the last step; constant where ``frozen``.
        direction: int8: sign of the last change of each integer; 0 before the first.
        frequency: float32: the moving average of how often a change reverses the one before (equation 5).
        average: float32: the moving average of the integers; a weight freezes at the nearest integer.
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
    """The attributes; together they are the state in a checkpoint."""

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
        """Update the statistics with the integers after one more step (algorithm 1 of the paper).

        Args:
            integers: Integers of the present weight; frozen ones keep their value.
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
        """Freeze weights that oscillate more often than ``threshold``, each at the integer nearest to its average.

        Args:
            threshold: A frequency, from 0 to 1.
            inside: Smallest and largest integer; only weights strictly between them may be frozen. Of any shape that
                broadcasts with the weight; None for no limits. If the grid is computed from the weights, those at its
                ends determine it.
        """
        new = (self.frequency > threshold) & ~self.frozen
        wanted = self.average.round().to(torch.int16)
        if inside is not None:
            for integers in (self.integers, wanted):
                new &= (integers > inside[0]) & (integers < inside[1])
        self.integers = torch.where(new, wanted, self.integers)
        self.frozen |= new

    def counts(self) -> tuple[Tensor, Tensor]:
        """Number of oscillating weights, and of frozen ones; frozen weights no longer oscillate."""
        return ((self.frequency > OSCILLATES) & ~self.frozen).sum(), self.frozen.sum()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, on the device of the current tensors.

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
