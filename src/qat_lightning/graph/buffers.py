"""Writing values back into buffers, and runs of a network that leave them as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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


@contextmanager
def buffers_copied(*networks: nn.Module) -> Iterator[None]:
    """Within the block, networks have copies of their buffers: what a forward writes there is dropped at the end.

    Tensors that the forward returns keep their values, also if they are buffers.

    Args:
        networks: Networks; their submodules are included.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with buffers_copied(norm):
        ...     _ = norm(torch.ones(3, 2))
        ...     norm.running_mean
        tensor([0.1000, 0.1000])
        >>> norm.running_mean
        tensor([0., 0.])
    """
    tables = [module._buffers for network in networks for module in network.modules()]
    own = [dict(table) for table in tables]
    # Copied together, so that buffers which share memory still do.
    copied = copy.deepcopy([{name: _detached(buffer) for name, buffer in table.items()} for table in own])
    try:
        _put(tables, copied)
        yield
    finally:
        _put(tables, own)


def _detached(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach()


def _put(tables: list[dict[str, Tensor | None]], buffers: list[dict[str, Tensor | None]]) -> None:
    for table, found in zip(tables, buffers, strict=True):
        for name, buffer in found.items():
            table[name] = buffer
