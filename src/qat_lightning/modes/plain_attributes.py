"""Plain attributes of modules, such as a temperature or a flag, that change while a network trains."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from qat_lightning.errors import CheckpointMismatchError
from qat_lightning.graph.scopes import join

Attributes = dict[str, dict[str, Any]]
"""Values of attributes, by the name of the module and their own."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a string, a flag, None, or a list, tuple or dict of such.

    Example:
        >>> is_plain({"sizes": [1, 2.5], "name": None}), is_plain(nn.Linear(1, 1))
        (True, False)
    """
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str)


def is_own(name: str) -> bool:
    """Whether a module's attribute of this name is its own, and not one that every module has, as ``training``."""
    return name not in _OF_EVERY_MODULE


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module of its own, and those whose values are defaults of its class."""
    present = class_defaults(type(module)) | vars(module)
    return {name: value for name, value in present.items() if is_own(name) and is_plain(value)}


def class_defaults(cls: type) -> dict[str, Any]:
    """The plain attributes of a class of modules, which its instances may set.

    Example:
        >>> class Net(nn.Module):
        ...     warm = False
        >>> class_defaults(Net)
        {'warm': False}
    """
    classes = [each for each in reversed(cls.__mro__) if each not in nn.Module.__mro__]
    named = {name: value for each in classes for name, value in vars(each).items()}
    return {name: value for name, value in named.items() if not name.startswith("__") and is_plain(value)}


def attributes_like(network: nn.Module, float_network: nn.Module) -> Attributes:
    """Copies of the plain attributes of a network that its float network has too."""
    modules = dict(network.named_modules(remove_duplicate=False))
    found: Attributes = {}
    for path, module in float_network.named_modules():
        if path in modules:
            own, values = plain_attributes(module), plain_attributes(modules[path])
            found[path] = {name: copy.deepcopy(value) for name, value in values.items() if name in own}
    return found


def differing(before: Attributes, now: Attributes) -> Attributes:
    """The attributes that have other values now, with these values; without modules where there are none.

    Example:
        >>> differing({"": {"alpha": 0.0, "steps": 3}}, {"": {"alpha": 0.5, "steps": 3}})
        {'': {'alpha': 0.5}}
    """
    changed = {
        path: {name: value for name, value in values.items() if before.get(path, {}).get(name, value) != value}
        for path, values in now.items()
    }
    return {path: values for path, values in changed.items() if values}


def set_attributes(network: nn.Module, attributes: Attributes) -> None:
    """Give plain attributes of a network other values; attributes that it does not have are left out."""
    for path, module in network.named_modules(remove_duplicate=False):
        present = plain_attributes(module)
        for name, value in attributes.get(path, {}).items():
            if name in present and is_plain(value):
                vars(module)[name] = copy.deepcopy(value)


def take_attributes(network: nn.Module, attributes: Attributes) -> None:
    """Run `set_attributes` with those of a file, which may set numbers and flags, but no strings.

    Raises:
        CheckpointMismatchError: The network has another string.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    for path, values in attributes.items():
        for name, value in values.items():
            if _has_string(value) and getattr(modules.get(path), name, value) != value:
                raise CheckpointMismatchError(
                    f"Training changed {join(path, name)!r} of the network that was quantized to {value!r}: give a "
                    "float network with the same value."
                )
    set_attributes(network, attributes)


def _has_string(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_string, value))
    return isinstance(value, str) or (isinstance(value, dict) and any(map(_has_string, value.values())))
