"""Writing values back into buffers."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def write_back(buffer: Tensor, value: Tensor) -> None:
    """Copy values into a buffer.

    Args:
        buffer: It may be an expanded view; torch refuses to write to elements that share memory.
        value: A tensor of the same shape.

    Example:
        >>> buffer = torch.zeros(2).unsqueeze(1).expand(2, 3)
        >>> write_back(buffer, torch.ones(2, 3))
        >>> buffer.sum()
        tensor(6.)
    """
    if buffer.layout is torch.strided:
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in buffer.stride())
        buffer, value = buffer[once], value[once]
    buffer.copy_(value)
