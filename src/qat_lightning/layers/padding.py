"""Zero padding of float and quantized tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pad(input: Tensor, amounts: Sequence[int]) -> Tensor:
    """Pad with zeros; a quantized tensor stays on its grid.

    `torch.nn.functional.pad` supports quantized tensors too, but first fills the whole new tensor value by value, which
    on images takes ten times as long as the rest.

    Args:
        input: Any float tensor, or a quantized one with one scale.
        amounts: Before and after each dimension, the last dimension first; not negative.

    Example:
        >>> integers = torch.quantize_per_tensor(torch.ones(1, 1, 2, 2), 0.5, 3, torch.quint8)
        >>> pad(integers, (0, 1, 0, 0)).int_repr()
        tensor([[[[5, 5, 3],
                  [5, 5, 3]]]], dtype=torch.uint8)
    """
    if not input.is_quantized:
        return F.pad(input, list(amounts))
    around = [(0, 0)] * (input.dim() - len(amounts) // 2)
    around += [(amounts[index], amounts[index + 1]) for index in range(len(amounts) - 2, -1, -2)]
    sizes = [size + before + behind for size, (before, behind) in zip(input.shape, around, strict=True)]
    layout = torch.contiguous_format
    for dim, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if input.dim() == dim and input.is_contiguous(memory_format=last):
            layout = last
    grid: dict[str, Any] = {
        "scale": input.q_scale(),
        "zero_point": input.q_zero_point(),
        "dtype": input.dtype,
        "device": input.device,
    }
    padded: Tensor = torch._empty_affine_quantized(sizes, **grid, memory_format=layout)
    zero = torch._empty_affine_quantized([1] * input.dim(), **grid).fill_(0)
    inner: Tensor = padded
    for dim, (before, behind) in enumerate(around):
        for start, amount in ((0, before), (before + input.shape[dim], behind)):
            if amount:
                border = inner.narrow(dim, start, amount)
                border.copy_(zero.expand(border.shape))
        inner = inner.narrow(dim, before, input.shape[dim])
    inner.copy_(input)
    return padded
