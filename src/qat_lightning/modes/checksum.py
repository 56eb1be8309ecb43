"""A checksum of the values that a prepared network is converted from, which tells whether a conversion is outdated."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qat_lightning.modes.prepared import fake_quantizers, prepared_state
from qat_lightning.modes.sharded import is_sharded


def checksum(prepared: nn.Module) -> int:
    """A checksum of weights, statistics and observed ranges; 0 for a sharded network, whose values are not all here.

    It reads the values, because not every change increases a tensor's version (``p.data.copy_`` does not). Left out is
    what evaluation itself computes: the ranges of weights, and a graph's constants for inputs of other sizes.

    Args:
        prepared: The result of a mode's ``prepare``.

    Example:
        >>> from qat_lightning import Example, Recipe, prepare
        >>> network = prepare(nn.Linear(2, 3), Example((torch.ones(1, 2),)), Recipe("eager", "x86", kind="dynamic"))
        >>> before = checksum(network)
        >>> network.weight.data[0, 0] += 1
        >>> checksum(network) == before
        False
    """
    found = 0
    for tensor in () if is_sharded(prepared) else _tensors(prepared):
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(values.numpy().data, found)
    return found


def _tensors(prepared: nn.Module) -> Iterator[Tensor]:
    yield from prepared.parameters()
    float_buffers = dict(prepared_state(prepared).float_network.named_buffers())
    yield from (buffer for name, buffer in prepared.named_buffers() if name in float_buffers)
    for _, fq in fake_quantizers(prepared):
        if fq.observed:
            yield from (fq.min_val, fq.max_val)
