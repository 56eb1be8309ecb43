"""Methods of containers, most of which Python only looks for in classes, for modules that take a container's place."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn

_METHODS = ("__getitem__", "__iter__", "__len__", "__contains__")
_OF_DICTS = ("keys", "items", "values")

Instead = Callable[[Any], Any]
"""Given a module, returns the object whose methods answer for it: a function of a module, so that pickles find it."""


def take_special_methods(module: nn.Module, source: type, instead: Instead) -> None:
    """Let a module be indexed, iterated over and measured if ``source`` can be.

    Its class becomes a subclass of its own, which copies and pickles make again.
    """
    names = (*_METHODS, *_OF_DICTS) if issubclass(source, (nn.ModuleDict, nn.ParameterDict)) else _METHODS
    methods = tuple(name for name in names if hasattr(source, name))
    own: Any = type(module)
    if methods:
        module.__class__ = _subclass(own, methods, instead)


@lru_cache
def _subclass(cls: type[nn.Module], methods: tuple[str, ...], instead: Instead) -> type[nn.Module]:
    def reduce(self: nn.Module) -> tuple[Any, ...]:
        return _blank, (cls, methods, instead), self.__getstate__()

    members: dict[str, Any] = {name: _answered(name, instead) for name in methods}
    members |= {"__reduce__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), members)


def _blank(cls: Any, methods: tuple[str, ...], instead: Instead) -> nn.Module:
    made = _subclass(cls, methods, instead)
    return made.__new__(made)


def _answered(name: str, instead: Instead) -> Callable[..., Any]:
    def method(self: nn.Module, *args: Any) -> Any:
        return getattr(instead(self), name)(*args)

    method.__name__ = name
    return method
