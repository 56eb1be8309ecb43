"""State other than its inputs that a network's call may depend on or change, and detecting changes in it.

Python code can reach the network's modules and their attributes, their classes, the global variables that it names,
what these refer to, and closure variables. All of it is recorded once and compared afterwards: after the call, to
detect what the call changed, and before later calls, to detect whether they would take the same path.
"""

from __future__ import annotations

import collections
import contextvars
import dis
import functools
import itertools
import operator
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.graph.hooks import SharedHook

_MOST_OBJECTS = 400
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_MUTABLE = (list, dict, set, collections.deque, bytearray)
_NESTED = (*_MUTABLE, tuple, frozenset)
_PARTS: dict[type, tuple[str, ...]] = {
    types.MethodType: ("__func__", "__self__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget",),
    functools.partial: ("func", "args", "keywords"),
    functools.cached_property: ("func",),
    type(functools.lru_cache(int)): ("__wrapped__",),
}
"""Types of objects that call functions, and the attributes that hold these functions."""
_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
_COMPARED = ("training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
"""Those of them that can affect what a module of a user's class computes."""
_OF_KERNELS = ("_packed_params", "scale", "zero_point")
"""Attributes that torch's quantized layers read when called; their other attributes describe what was packed."""
_TRUSTED = ("torch", "qat_lightning")
_chained = itertools.chain.from_iterable
_DESCRIBES = "quantization_plan"
"""Attributes that describe an int8 network of eager mode in its file; no call reads them."""


def is_trusted(module: str) -> bool:
    """Whether a module belongs to a package whose code is not inspected."""
    return module.partition(".")[0] in _TRUSTED


def is_standard(module: str) -> bool:
    """Whether a module belongs to Python's standard library."""
    return module.partition(".")[0] in sys.stdlib_module_names


class _Attributes:
    """Attributes of many modules, with the same names in each.

    The check runs between kernels, whose weights have evicted everything else from the cache, so it must touch little
    memory. All values are in one list, and are compared by identity first.

    Args:
        names: The names.
    """

    def __init__(self, names: list[str]) -> None:
        self._get = operator.itemgetter(*names, names[0])  # returns a tuple even for a single name
        self._found: list[dict[str, Any]] = []
        self._values: list[Any] = []

    def hold(self, found: dict[str, Any]) -> None:
        """Record the attributes of a module, given its ``__dict__``."""
        self._found.append(found)
        self._values.extend(self._get(found))

    def are_as_they_were(self) -> bool:
        """Whether no module's attribute has another value."""
        return list(_chained(map(self._get, self._found))) == self._values


class _Tables:
    """Dictionaries that are compared as a whole, stored in the same way."""

    def __init__(self) -> None:
        self._found: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._keys: list[str] = []
        self._values: list[Any] = []

    def __len__(self) -> int:
        return len(self._found)

    def hold(self, found: dict[str, Any]) -> None:
        """Record a dictionary."""
        self._found.append(found)
        self._sizes.append(len(found))
        self._keys.extend(found)
        self._values.extend(found.values())

    def are_as_they_were(self) -> bool:
        """Whether no dictionary has gained, lost or moved an entry."""
        return (
            list(map(len, self._found)) == self._sizes
            and list(_chained(self._found)) == self._keys
            and list(_chained(map(dict.values, self._found))) == self._values
        )


class Surroundings:
    """A snapshot of the state other than its inputs that a network's call may depend on.

    Args:
        network: The network.

    Attributes:
        complete: Whether everything could be recorded, and no module has a foreign hook.
    """

    def __init__(self, network: nn.Module) -> None:
        self.complete = True
        self._sized: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._attributes: dict[tuple[str, ...], _Attributes] = {}
        self._tables = _Tables()
        self._held: list[Any] = []
        self._copied: list[Any] = []
        self._seen: set[int] = set()
        self._classes: set[type] = set()
        self._tensors: dict[int, Tensor] = {}
        self._counted: list[Tensor] = []
        self._versions: list[int] = []
        self._asked: list[tuple[Callable[[], Any], Any]] = []
        self._functions: dict[types.CodeType, list[types.FunctionType]] = {}
        self._names: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._handles = _hook_handles()
        self._hooks: list[Any] = []
        self._hooked = 0
        everywhere = torch.nn.modules.module
        self._hook(everywhere._global_forward_hooks)
        self._hook(everywhere._global_forward_pre_hooks)
        self._look(network)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is part of the snapshot."""
        return id(tensor) in self._tensors

    def entered(self, code: types.CodeType, space: dict[str, Any]) -> None:
        """Record what a function can reach, before it runs: its global variables and closure variables."""
        for function in self._functions.pop(code, ()):
            self._hold(vars(function))
            for value in (function.__defaults__, function.__kwdefaults__):
                self._look(value)
            for cell in function.__closure__ or ():
                self._ask(functools.partial(_content, cell))
        own = {one.argval for one in dis.get_instructions(code) if one.opname.endswith(("_GLOBAL", "_NAME"))}
        self._read(own, code.co_names, space, set())

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Record further tensors, whose values a recorded call reads."""
        for tensor in tensors:
            if id(tensor) not in self._tensors:
                self._tensors[id(tensor)] = tensor
                if not tensor.is_inference():
                    self._counted.append(tensor)
                    self._versions.append(tensor._version)

    def are_as_they_were(self) -> bool:
        """Whether nothing has changed since."""
        if self._handles != _hook_handles():
            if sum(map(len, self._hooks)) != self._hooked:
                return False
            self._handles = _hook_handles()
        if [tensor._version for tensor in self._counted] != self._versions:
            return False
        for space, known in self._names.values():
            if not all(map(operator.is_, map(space.get, known), known.values())):
                return False
        if not all(ask() is value for ask, value in self._asked):
            return False
        try:
            # Lists of equal length, which are compared without running Python code between kernels.
            return (
                list(map(len, self._sized)) == self._sizes
                and all(attributes.are_as_they_were() for attributes in self._attributes.values())
                and self._tables.are_as_they_were()
                and self._held == self._copied
            )
        except Exception:  # noqa: BLE001 - a tensor replaced another; comparing tensors gives no single truth value
            return False

    def _read(self, names: Iterable[str], inner: Iterable[str], space: dict[str, Any], done: set[int]) -> None:
        """Record the variables of a module; for variables that are modules, also their variables named in ``inner``."""
        done.add(id(space))
        known = self._names.setdefault(id(space), (space, {}))[1]
        for name in names:
            if name not in space:
                continue
            value = known.setdefault(name, space[name])
            if isinstance(value, types.ModuleType):
                if id(vars(value)) not in done:
                    self._read(inner, inner, vars(value), done)
            else:
                self._look(value)

    def _look(self, value: Any) -> None:
        if isinstance(value, PLAIN) or id(value) in self._seen or not self.complete:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self.follow((value,))
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, _NESTED):
            self._container(value)
        elif isinstance(value, type):
            if not is_trusted(value.__module__):
                self._class(value)
        elif isinstance(value, types.FunctionType):
            if not is_trusted(value.__module__ or ""):
                self._functions.setdefault(value.__code__, []).append(value)
        else:
            self._object(value)

    def _container(self, value: Any) -> None:
        if isinstance(value, _MUTABLE):
            self._hold(value)
        for inner in list(value.values() if isinstance(value, dict) else value):
            self._look(inner)

    def _module(self, module: nn.Module) -> None:
        found = vars(module)
        own = [name for name in found if name not in _OF_MODULES and name != _DESCRIBES]
        # As few attributes as possible and no copy: memory read between kernels evicts their data from the cache.
        self._sized.append(found)
        self._sizes.append(len(found))
        if compared := _compared(type(module), own):
            self._attributes.setdefault(tuple(compared), _Attributes(compared)).hold(found)
        self._hook(module._forward_hooks)
        self._hook(module._forward_pre_hooks)
        for held in (module._modules, module._parameters, module._buffers):
            if held:
                self._hold_table(held)
                for inner in list(held.values()):
                    self._look(inner)
        self._class(type(module))
        for name in own:
            self._look(found[name])

    def _hook(self, hooks: dict[int, Any]) -> None:
        self._hooks.append(hooks)
        self._hooked += len(hooks)
        if hooks:
            self._hold(hooks)
        self.complete = self.complete and _are_ours(hooks)

    def _class(self, kind: type) -> None:
        """Record a class and its base classes: their functions, which can be replaced, and their attributes."""
        for one in kind.__mro__:
            if one in self._classes or is_standard(one.__module__):
                continue
            self._classes.add(one)
            self._hold(vars(one))
            for name, value in list(vars(one).items()):
                if not is_trusted(one.__module__) and (isinstance(value, types.FunctionType) or name[:2] != "__"):
                    self._look(value)

    def _object(self, value: Any) -> None:
        """Record an object of a user's class; opaque objects, such as arrays, end the recording."""
        home = type(value).__module__
        if type(value) in _PARTS:
            for name in _PARTS[type(value)]:
                self._look(getattr(value, name))
        elif isinstance(value, contextvars.ContextVar):
            self._ask(functools.partial(value.get, None))
        elif isinstance(value, types.ModuleType) or is_trusted(home) or home == "logging":
            return
        elif hasattr(type(value), "__next__"):
            self.complete = False
        elif hasattr(value, "__dict__"):
            self._hold(vars(value))
            self._look(type(value))
            for inner in list(vars(value).values()):
                self._look(inner)
        elif not is_standard(home) or home == "array":
            self.complete = False

    def _ask(self, ask: Callable[[], Any]) -> None:
        value = ask()
        self._asked.append((ask, value))
        self._look(value)

    def _hold(self, found: Any) -> None:
        self._held.append(found)
        self._copied.append(next((kind for kind in _MUTABLE if isinstance(found, kind)), dict)(found))
        self._count()

    def _hold_table(self, found: dict[str, Any]) -> None:
        self._tables.hold(found)
        self._count()

    def _count(self) -> None:
        """End the recording if there are too many objects to compare in each call."""
        if len(self._held) + len(self._tables) + len(self._sized) > _MOST_OBJECTS + 4 * len(self._hooks):
            self.complete = False


def _compared(kind: type, own: list[str]) -> list[str]:
    """Return the attributes of a module, among its class's and its own, that its call may depend on."""
    home = kind.__module__
    if not is_trusted(home):
        return [*_COMPARED, *own]
    if home.startswith("torch.ao."):
        return [name for name in own if name in _OF_KERNELS] or own
    if home.startswith("qat_lightning."):
        return [name for name in getattr(kind, "may_change", own) if name in own]
    return ["training", *own] if own else []


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable without a value
        return None


def _are_ours(hooks: dict[int, Any]) -> bool:
    """Whether hooks are part of an int8 network, such as those that quantize a layer's input."""
    return all(
        (getattr(hook, "__module__", None) or "").startswith("qat_lightning.") and not isinstance(hook, SharedHook)
        for hook in hooks.values()
    )


def _hook_handles() -> int:
    """Return the number of hooks registered so far in this process: while it is unchanged, no module got a hook."""
    return RemovableHandle.next_id
