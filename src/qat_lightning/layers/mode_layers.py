"""Modules for computations that differ between training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn


class ByMode(nn.Module):
    """Calls a function whose arguments depend on whether the network trains.

    Args:
        function: The function to call.
        training: Its positional and keyword arguments in training, with `GIVEN` in place of tensors.
        evaluation: The same for evaluation.
    """

    def __init__(self, function: Any, training: Any, evaluation: Any) -> None:
        super().__init__()
        self.function = function
        self.by_mode = {True: training, False: evaluation}

    def forward(self, *tensors: Any) -> Any:
        """Call the function with the tensors, in their order among its arguments."""
        return self.as_in(tensors, training=self.training)

    def as_in(self, tensors: Iterable[Any], *, training: bool) -> Any:
        """Call the function with the arguments of training or of evaluation, whatever the own flag is."""
        args, kwargs = self.arguments(tensors, training=training)
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)

    def arguments(self, tensors: Iterable[Any], *, training: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of the function."""
        given = iter(tensors)

        def fill(leaf: Any) -> Any:
            return next(given) if leaf is GIVEN else leaf

        args, kwargs = fx.node.map_aggregate(self.by_mode[training], fill)
        return args, kwargs


class _Given:
    """Placeholder for a tensor among the arguments of `ByMode`; a singleton."""

    def __reduce__(self) -> str:
        return "GIVEN"


GIVEN = _Given()


class DropoutLike(nn.Module):
    """Changes its input only in training, such as stochastic depth, so it is left out of int8 networks.

    Args:
        inner: The module that runs in training.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: Tensor) -> Any:
        """``inner(input)`` in training, otherwise ``input``."""
        return self.inner(input) if self.training else input

    def __getattr__(self, name: str) -> Any:
        """Attributes of the replaced module, such as its probability."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "inner" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["inner"], name)
