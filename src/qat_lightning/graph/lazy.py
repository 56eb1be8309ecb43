"""Modules whose parameters get their shapes in the first call, such as `nn.LazyLinear`."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin


def is_lazy(module: nn.Module) -> bool:
    """Whether a module waits for its first call, without regard to its submodules.

    Example:
        >>> is_lazy(nn.LazyLinear(4)), is_lazy(nn.Linear(4, 4)), is_lazy(nn.Sequential(nn.LazyLinear(4)))
        (True, False, False)
    """
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()  # type: ignore[no-untyped-call]
