"""What all FakeQuantizes of one prepared network know together: whether it trains, and where a forward pass begins.

A layer alone knows neither. One that is kept in evaluation while the rest trains, as a backbone is in transfer
learning, sees the batches of the training all the same; and one that is called several times in a forward pass sees a
part of the batch each time.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Course(nn.Module):
    """A module without tensors, whose flag follows ``train`` and ``eval`` of the network as a whole.

    Attributes:
        in_training_step: Whether a training step runs now, which whoever runs the steps says: then a network trains
            whatever its flags are.
        in_forward: Whether the network's forward runs now, in which a place that is passed several times has one range.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), Course())
        >>> _ = network[0].eval()
        >>> network[1].trains
        True
        >>> _ = network.eval()
        >>> network[1].trains
        False
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_training_step = False
        self.in_forward = False

    @property
    def trains(self) -> bool:
        """Whether what the network computes now belongs to its training."""
        return self.training or self.in_training_step

    def forward(self, input: Any) -> Any:
        """``input`` itself."""
        return input

    def __deepcopy__(self, memo: dict[int, Any]) -> Course:
        """That of a copied network, which nobody runs yet."""
        copied = type(self)()
        copied.training = self.training
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Likewise for a pickled one."""
        kept = {name: value for name, value in self.__dict__.items() if name != "places"}
        return kept | {"in_training_step": False, "in_forward": False}
