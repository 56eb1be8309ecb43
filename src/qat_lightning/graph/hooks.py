"""Hooks that the user registered on modules of a network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

_PART_OF_THE_NETWORK = ("torch", "transformers")
"""Packages whose hooks compute weights, or collect outputs for the forward around them."""

_LOOK_ON = ("qat_lightning", "lightning", "pytorch_lightning", "wandb")
"""Packages whose hooks need not see every layer: summaries of the network and drawings of its graph."""


class SharedHook:
    """A bound method as a hook, which copies of the network share, instead of copying the object that it belongs to.

    Args:
        hook: The method.
    """

    def __init__(self, hook: MethodType) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> Any:
        """Call the method."""
        return self.hook(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedHook:
        """Itself."""
        return self


def share_hooks(network: nn.Module) -> None:
    """Let copies of a network share its hooks: a copied method would write to a copy of its LightningModule."""
    for module in network.modules():
        for name in TABLES:
            hooks = module.__dict__[name]
            for key, hook in hooks.items():
                if isinstance(hook, MethodType):
                    hooks[key] = SharedHook(hook)


def users_hooks(module: nn.Module) -> Iterator[tuple[dict[int, Callable[..., Any]], int]]:
    """The user's hooks on one module: the table that has it, and its key there."""
    for name in TABLES:
        if table := module.__dict__[name]:
            yield from ((table, key) for key, hook in table.items() if _is_users(hook))


def _is_users(hook: Any) -> bool:
    while isinstance(hook, (functools.partial, SharedHook)):
        hook = hook.func if isinstance(hook, functools.partial) else hook.hook
    package = (getattr(hook, "__module__", None) or "").partition(".")[0]
    return package not in (*_PART_OF_THE_NETWORK, *_LOOK_ON)
