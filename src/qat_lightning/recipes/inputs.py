"""The samples that a layer gets in a call of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qat_lightning.layers.inputs import input_of


def samples_of(layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a convolution or linear layer in float32, with a batch dimension also if it was called without.

    Args:
        layer: The layer; its weight has as many dimensions as its input at least has with a batch dimension.
        args: The positional arguments of the call.
        kwargs: Its keyword arguments.

    Example:
        >>> import torch
        >>> samples_of(torch.nn.Conv1d(3, 4, 1), (torch.rand(3, 8),), {}).shape
        torch.Size([1, 3, 8])
    """
    found = input_of(args, kwargs).float()
    return found if found.dim() >= layer.weight.dim() else found.unsqueeze(0)
