"""Modules for what a network does in one way in training and in another in evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn


class ByMode(nn.Module):
    """A function that is told by its arguments whether the network trains, and is told its own flag instead.

    Args:
        function: What to call.
        training: Its positional and keyword arguments in training; `GIVEN` where a tensor comes.
        evaluation: Likewise in evaluation.
    """

    def __init__(self, function: Any, training: Any, evaluation: Any) -> None:
        super().__init__()
        self.function = function
        self.by_mode = {True: training, False: evaluation}

    def forward(self, *tensors: Any) -> Any:
        """Call the function on the tensors, in the order in which they come among its arguments."""
        args, kwargs = self.arguments(tensors, training=self.training)
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)

    def arguments(self, tensors: Iterable[Any], *, training: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the function is called with, positional and by keyword."""
        given = iter(tensors)

        def fill(leaf: Any) -> Any:
            return next(given) if leaf is GIVEN else leaf

        args, kwargs = fx.node.map_aggregate(self.by_mode[training], fill)
        return args, kwargs


class _Given:
    """The place of a tensor among the arguments of `ByMode`; there is one."""

    def __reduce__(self) -> str:
        return "GIVEN"


GIVEN = _Given()


class DropoutLike(nn.Module):
    """What changes its input in training only, such as stochastic depth, and so is in no int8 network.

    Args:
        inner: What it does in training.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: Tensor) -> Any:
        """What ``inner`` makes of ``input`` in training, otherwise ``input``."""
        return self.inner(input) if self.training else input

    def __getattr__(self, name: str) -> Any:
        """What is asked of the module in whose place it is, such as its probability."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "inner" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["inner"], name)
