"""``x[index] = value`` as a function, for graphs, which cannot contain assignments."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of ``x`` with ``value`` at ``index``.

    Example:
        >>> import torch
        >>> x = torch.zeros(3)
        >>> assigned(x, slice(1, None), 2.0), x
        (tensor([0., 2., 2.]), tensor([0., 0., 0.]))
    """
    changed = x.clone()
    changed[index] = value
    return changed
