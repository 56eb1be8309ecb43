"""Modules whose parameters get their shapes in the first call, such as `nn.LazyLinear`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example, running_its_example
from qat_lightning.graph.training_flags import evaluating


def is_lazy(module: nn.Module) -> bool:
    """Whether a module waits for its first call, without regard to its submodules.

    Example:
        >>> is_lazy(nn.LazyLinear(4)), is_lazy(nn.Linear(4, 4)), is_lazy(nn.Sequential(nn.LazyLinear(4)))
        (True, False, False)
    """
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


@torch.no_grad()
def materialize(network: nn.Module, example: Example) -> None:
    """Give lazy modules their parameters, as the first call in training would; that of evaluation if it calls others.

    Args:
        network: Any network; without lazy modules it is not called.
        example: A call of it.

    Raises:
        NetworkError: The call fails, or does not reach a lazy module.

    Example:
        >>> network = nn.Sequential(nn.LazyLinear(4))
        >>> materialize(network, Example((torch.ones(2, 3),)))
        >>> network
        Sequential(
          (0): Linear(in_features=3, out_features=4, bias=True)
        )
    """
    contexts: tuple[AbstractContextManager[None], ...] = (nullcontext(), evaluating(network))
    for context in contexts:
        if _lazy_modules(network):
            with context, running_its_example(network):
                network(*example.args, **example.kwargs)
    if left := _lazy_modules(network):
        raise NetworkError(
            f"{type(network).__name__} does not call {', '.join(map(repr, left))} with its example inputs, and lazy "
            "modules get their parameters in their first call. Build them with their sizes (nn.Linear instead of "
            "nn.LazyLinear), or remove them."
        )


def refuse_lazy(network: nn.Module) -> None:
    """Raise if a network has lazy modules that were not called yet: they cannot be copied.

    Raises:
        NetworkError: The message names them.

    Example:
        >>> refuse_lazy(nn.Sequential(nn.Linear(2, 2)))
    """
    if lazy := _lazy_modules(network):
        raise NetworkError(
            f"{type(network).__name__} has lazy modules without parameters ({', '.join(map(repr, lazy))}): call it "
            "once with real inputs before."
        )


def _lazy_modules(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if is_lazy(module)]
