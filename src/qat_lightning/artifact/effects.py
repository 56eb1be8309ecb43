"""What Python code does beside computing, and what it decides by: both are gone from a recording of its kernels.

While a call is recorded, each function that it calls is looked at. Printing, clocks, files and chance are seen by where
a function is from; what is written to an object by comparing `Surroundings` from before with what is there afterwards.
The same comparison tells later whether a call would still take the same way.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.artifact.operations import words

_MOST_OBJECTS = 400
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_HARMLESS = frozenset(
    words(
        """
        _abc _collections _contextvars _functools _operator _thread _typing _weakref abc builtins cmath collections
        contextlib copy dataclasses functools inspect itertools math numbers operator types typing weakref
        """
    )
)
"""Modules whose functions do nothing but compute."""
_ACTS = frozenset({"print", "input", "open", "exec", "eval", "compile", "breakpoint", "setattr", "delattr", "id"})
"""Functions among the builtins that do more, or give something else in each process."""
_TRUSTED = ("torch", "qat_lightning")
"""Packages whose own code is not looked into, but for `_ACTS`."""
_ITERATORS: tuple[Any, ...] = (types.GeneratorType, type(iter([])), type(iter(())), type(iter({})), zip, enumerate)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules of which nothing but their children is read."""
_OF_MODULES = frozenset(vars(nn.Module()))
"""What every module holds."""
_VALUES = (*_PLAIN, list, dict, set, frozenset, tuple, range, slice, type, types.ModuleType, *_ITERATORS)
"""Types whose methods change nothing but the value itself."""


class Watched:
    """Looks at each function that is called in this thread until the ``with`` ends.

    Attributes:
        acts: The first function that does more than compute; empty if there was none.
        names: Plain global variables that the code can read, by the namespace that they are in.
    """

    def __init__(self) -> None:
        self.acts = ""
        self.names: dict[int, tuple[dict[str, Any], set[str]]] = {}
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
            self._read(frame)
        elif event == "c_call" and _is_act(function, frame.f_globals.get("__name__", "")):
            self.acts = getattr(function, "__qualname__", repr(function))

    def _read(self, frame: types.FrameType) -> None:
        code, spaces = frame.f_code, frame.f_globals
        home = spaces.get("__name__", "")
        if code in self._codes or _is_trusted(home) or home in _HARMLESS:
            return
        self._codes.add(code)
        found = {name for name in code.co_names if isinstance(spaces.get(name), _PLAIN) and name in spaces}
        if found:
            self.names.setdefault(id(spaces), (spaces, set()))[1].update(found)


def _is_trusted(module: str) -> bool:
    return module.partition(".")[0] in _TRUSTED


def _is_act(function: Any, caller: str) -> bool:
    owner = getattr(function, "__self__", None)
    home = getattr(function, "__module__", None)
    if home is None and isinstance(owner, (type, types.ModuleType)):
        home = owner.__module__ if isinstance(owner, type) else owner.__name__
    if home == "builtins":
        return function.__name__ in _ACTS and not (_is_trusted(caller) and function.__name__ in ("id", "setattr"))
    if _is_trusted(caller):
        return False
    if home is not None:
        return not (home in _HARMLESS or _is_trusted(home))
    return not (owner is None or isinstance(owner, (*_VALUES, Tensor)) or _is_trusted(type(owner).__module__))


class Surroundings:
    """What a call of a network can depend on beside its inputs: modules, their hooks, objects they hold, and weights.

    Args:
        network: The network.
        tensors: Further tensors whose values it reads.
        names: Global variables that its code reads, see `Watched.names`.

    Attributes:
        complete: Whether all of it could be looked at, and no module has a hook that is not ours.
    """

    def __init__(
        self,
        network: nn.Module,
        tensors: Iterable[Tensor] = (),
        names: Iterable[tuple[dict[str, Any], set[str]]] = (),
    ) -> None:
        self.complete = True
        self._held: list[Any] = []
        self._copied: list[Any] = []
        self._seen: set[int] = set()
        self._tensors: dict[int, Tensor] = {}
        hooks = torch.nn.modules.module
        self._hooks = [hooks._global_forward_hooks, hooks._global_forward_pre_hooks]
        for module in network.modules():
            self._module(module)
        for tensor in tensors:
            self._tensors[id(tensor)] = tensor
        self._names = [(space, name, space[name]) for space, found in names for name in found]
        self._handles = _hook_handles()
        self.complete = self.complete and all(map(_are_ours, self._hooks))
        self._counted = [tensor for tensor in self._tensors.values() if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._counted]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is among what the modules hold."""
        return id(tensor) in self._tensors

    def are_as_they_were(self) -> bool:
        """Whether nothing of it has changed since."""
        if self._handles != _hook_handles():
            if not all(map(_are_ours, self._hooks)):
                return False
            self._handles = _hook_handles()
        if [tensor._version for tensor in self._counted] != self._versions:
            return False
        if not all(space.get(name) is value for space, name, value in self._names):
            return False
        try:
            return self._held == self._copied
        except Exception:  # noqa: BLE001 - one tensor in place of another, which have no one truth value
            return False

    def _module(self, module: nn.Module) -> None:
        self._seen.add(id(module))
        attributes = vars(module)
        hooks: list[Any] = [module._forward_hooks, module._forward_pre_hooks]
        self._hooks += hooks
        for found in (*hooks, module._modules, module._parameters, module._buffers):
            if found:
                self._hold(found)
                self._tensors.update({id(tensor): tensor for tensor in found.values() if isinstance(tensor, Tensor)})
        if type(module) in _CONTAINERS:
            return
        self._hold(attributes)
        for name, value in attributes.items():
            if name not in _OF_MODULES:
                self._look(value)

    def _hold(self, found: Any) -> None:
        self._held.append(found)
        self._copied.append(found.copy())
        if len(self._held) > _MOST_OBJECTS + 4 * len(self._hooks):
            self.complete = False

    def _look(self, value: Any) -> None:
        if isinstance(value, _PLAIN) or id(value) in self._seen or not self.complete:
            return
        if isinstance(value, Tensor):
            self._tensors[id(value)] = value
        elif isinstance(value, (list, dict, set, tuple)):
            self._seen.add(id(value))
            if not isinstance(value, tuple):
                self._hold(value)
            for inner in list(value.values() if isinstance(value, dict) else value):
                self._look(inner)
        elif _is_object(value):
            self._seen.add(id(value))
            self._hold(vars(value))
            for inner in list(vars(value).values()):
                self._look(inner)


def _is_object(value: Any) -> bool:
    """Whether a value is an object of somebody's class, which can hold what a call depends on."""
    known = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)
    return hasattr(value, "__dict__") and not isinstance(value, known) and not _is_trusted(type(value).__module__)


def _are_ours(hooks: dict[int, Any]) -> bool:
    """Whether hooks are part of an int8 network, as those are that quantize what a layer is given."""
    return all((getattr(hook, "__module__", None) or "").startswith("qat_lightning.") for hook in hooks.values())


def _hook_handles() -> int:
    """How many hooks there have been in this process: while it is the same, no module has got one."""
    return RemovableHandle.next_id
