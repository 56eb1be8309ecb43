"""State shared by all FakeQuantizes of a prepared network: whether it trains, and where a forward pass begins.

A single layer cannot know this. A part that is kept in evaluation while the rest trains, as a backbone in transfer
learning, still sees the training's batches; and a layer that is called several times in a forward pass sees only a part
of the batch each time.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Course(nn.Module):
    """A module without tensors, whose ``training`` flag follows that of the network as a whole.

    Attributes:
        in_training_step: Whether a training step is running, set by the caller of the step: the network then counts as
            training, whatever its flags are.
        in_forward: Whether the network's forward is running; a FakeQuantize that is called several times within it has
            one range.
        passes: Number of forward passes that have ended. What is known of a tensor within one, such as its grid, does
            not hold after it: the network's caller gets plain values, also from the int8 network.

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
        self.passes = 0

    @property
    def trains(self) -> bool:
        """Whether the current computation belongs to training."""
        return self.training or self.in_training_step

    def forward(self, input: Any) -> Any:
        """Return ``input``."""
        return input

    def __deepcopy__(self, memo: dict[int, Any]) -> Course:
        """A copy that is not running."""
        copied = type(self)()
        copied.training = self.training
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Pickle it as not running."""
        kept = {name: value for name, value in self.__dict__.items() if name != "places"}
        return kept | {"in_training_step": False, "in_forward": False}
