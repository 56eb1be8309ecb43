"""Side effects of Python code, which a recording of its kernels would omit.

While a call is recorded, each Python function that it calls is checked. Printing, clocks, files and randomness are
detected by the module of the function; writes to objects by comparing `Surroundings` before and after the call.
"""

from __future__ import annotations

import sys
import types
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from qat_lightning.artifact.operations import words
from qat_lightning.artifact.surroundings import PLAIN, Surroundings, is_standard, is_trusted

_HARMLESS = words(
    """
    _abc _bisect _collections _collections_abc _contextvars _frozen_importlib _functools _heapq _operator _thread
    _typing _weakref _weakrefset abc bisect builtins cmath collections contextlib copy dataclasses decimal enum
    fractions functools heapq importlib inspect itertools math numbers operator re string sys textwrap types typing
    weakref
    """
)
"""Modules whose functions only compute, or change only what `Surroundings` compares."""
_ACTS = frozenset({"print", "input", "open", "exec", "eval", "compile", "breakpoint", "setattr", "delattr"})
"""Builtin functions that do more than compute."""
_CHANCE = "torch.random"
"""The module that sets and forks random states."""
_ITERATORS: tuple[Any, ...] = (types.GeneratorType, type(iter([])), type(iter(())), type(iter({})), zip, enumerate)
_VALUES = (
    *PLAIN,
    ContextVar,
    list,
    dict,
    set,
    frozenset,
    tuple,
    range,
    slice,
    type,
    types.ModuleType,
    types.MappingProxyType,
    *_ITERATORS,
)
"""Types whose methods only change the value itself, which `Surroundings` compares if it outlives the call."""


class Watched:
    """Checks each function that is called in this thread within a ``with`` block.

    Args:
        around: The surroundings that are compared afterwards; extended by what the functions reach.

    Attributes:
        acts: The first function that does more than compute; empty if there was none.
    """

    def __init__(self, around: Surroundings) -> None:
        self.acts = ""
        self._around = around
        self._codes: set[types.CodeType] = set()
        self._before: Any = None

    def __enter__(self) -> Watched:
        self._before = sys.getprofile()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(self._before)

    def _see(self, frame: types.FrameType, event: str, function: Any) -> None:
        if self.acts:
            return
        if event == "call":
            self._enter(frame)
        elif event == "c_call" and _is_act(function, _home(frame)):
            self.acts = getattr(function, "__qualname__", repr(function))

    def _enter(self, frame: types.FrameType) -> None:
        code, home = frame.f_code, _home(frame)
        if code in self._codes or home.partition(".")[0] in _HARMLESS:
            return
        if home == _CHANCE or (is_standard(home) and not is_trusted(_asks(frame))):
            self.acts = code.co_name
        elif not is_trusted(home) and not is_standard(home):
            self._codes.add(code)
            self._around.entered(code, frame.f_globals)


def _home(frame: types.FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name


def _asks(frame: types.FrameType) -> str:
    """The module on whose behalf a function of the standard library runs."""
    above: types.FrameType | None = frame
    while above is not None and is_standard(_home(above)):
        above = above.f_back
    return "" if above is None else _home(above)


def _is_act(function: Any, caller: str) -> bool:
    owner = getattr(function, "__self__", None)
    home = getattr(function, "__module__", None)
    if home is None and isinstance(owner, (type, types.ModuleType)):
        home = owner.__module__ if isinstance(owner, type) else owner.__name__
    if home == "builtins":
        return function.__name__ in _ACTS and not (is_trusted(caller) and function.__name__ == "setattr")
    if is_trusted(caller):
        return False
    if home is not None:
        return not (home in _HARMLESS or is_trusted(home))
    return not (owner is None or isinstance(owner, (*_VALUES, Tensor)) or is_trusted(type(owner).__module__))
