"""The input of a layer in a call of it, given by position or by keyword."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer that has only one, under whatever name.

    Args:
        args: The positional arguments of the call.
        kwargs: Its keyword arguments.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 4)
        >>> input_of((x,), {}) is input_of((), {"input": x})
        True
    """
    found: Tensor = (*args, *kwargs.values())[0]
    return found
