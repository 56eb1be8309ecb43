"""PyTorch's quantized tensors, which packed weights are made from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_deprecation() -> Iterator[None]:
    """Suppress PyTorch's warning on every use of its quantized tensors: the range of torch versions covers it.

    Example:
        >>> import torch
        >>> with without_deprecation():
        ...     torch._make_per_tensor_quantized_tensor(torch.zeros(2, dtype=torch.int8), 0.5, 0).int_repr().tolist()
        [0, 0]
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
        yield
