"""References to a network besides its name in the LightningModule: second names, wrappers, and plain Python objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from qat_lightning.errors import NetworkError

_CALL = "_compiled_call_impl"
"""What a call of a module runs if it is set, as ``nn.Module.compile`` does; copies and pickles do not have it."""


def replace_everywhere(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module under each of its names, also in wrappers.

    Through the tables of children, which works for containers (Sequential, ModuleList, ModuleDict) too.
    """
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def names_of(root: nn.Module, module: nn.Module) -> list[str]:
    """Return all dotted names of a module."""
    return [name for name, found in root.named_modules(remove_duplicate=False) if found is module]


def all_parts(network: nn.Module) -> set[nn.Module]:
    """Return the modules of a network, and those that its modules run without having them as children.

    Example:
        >>> outer, inner = nn.Identity(), nn.ReLU()
        >>> vars(outer)["runs"] = nn.Sequential(inner)
        >>> inner in set(outer.modules()), inner in all_parts(outer)
        (False, True)
    """
    found = set[nn.Module]()
    left = [network]
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            for value in vars(module).values():
                left += [part for part in _held_in(value) if isinstance(part, nn.Module)]
    return found


def _held_in(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (tuple, list)) else (value,)


class Redirections:
    """Lets calls of modules run something else, whoever holds the module, until they are removed."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Any]] = []

    def redirect(self, module: nn.Module, call: Callable[..., Any]) -> None:
        """Run ``call`` in place of a module and its hooks."""
        self._before.append((module, module.__dict__.get(_CALL)))
        module.__dict__[_CALL] = call

    def remove(self) -> None:
        """Let the modules run themselves again."""
        while self._before:
            module, before = self._before.pop()
            if before is None:
                module.__dict__.pop(_CALL, None)
            else:
                module.__dict__[_CALL] = before

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles redirect nothing."""
        return {"_before": []}


def own_call(module: nn.Module) -> Callable[..., Any]:
    """Return what a call of a module runs now."""
    found: Callable[..., Any] = module.__dict__.get(_CALL) or module._call_impl
    return found


def refusing(name: str) -> Callable[..., Any]:
    """Return a function that refuses calls of a part of a float network that a graph has replaced."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise NetworkError(
            f"A part of {name!r} was called that its preparation for quantization has replaced by one graph: code "
            "keeps a reference to this part, or to a method of the network, from before the fit, and would train and "
            f"test in float. Call the network itself in the step, self.{name}(...); or give module='<the part that "
            "is called>', or mode='eager', in which every part stays callable."
        )

    return refuse
