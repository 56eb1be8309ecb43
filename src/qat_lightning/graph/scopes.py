"""Which module of the float network a node of a captured graph belongs to, and dotted names."""

from __future__ import annotations

import itertools
import re

from torch import fx, nn


def scope_of(node: fx.Node) -> str:
    """Dotted name of the innermost module whose ``forward`` created ``node``; empty for the network itself.

    A module called under several names is known by the first.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    name = str(list(stack.values())[-1][0]).split("@")[0].removeprefix("L['self']")
    # For a module with a custom __getattr__, export records __dict__['_modules']['conv'].
    name = re.sub(r"(?:__dict__\['_modules'\]|_modules)?\['([^']+)'\]", r".\1", name)
    name = re.sub(r"\.+", ".", name).strip(".")
    # Nodes that export added itself, such as the size of an input, have a placeholder there.
    return "" if name.startswith("_empty_nn_module_stack") else name


def join(prefix: str, name: str) -> str:
    """``prefix.name``, or the one that is not empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def dotted(prefix: str) -> str:
    """What names below a prefix begin with: ``prefix.``, or nothing without a prefix."""
    return f"{prefix}." if prefix else ""


def unused_path(root: nn.Module, path: str) -> str:
    """``path`` with the first number that makes it the name of nothing that ``root`` holds.

    Example:
        >>> unused_path(nn.ModuleDict({"a": nn.ModuleDict({"b_0": nn.ReLU()})}), "a.b")
        'a.b_1'
    """
    parent, _, name = path.rpartition(".")
    holder: nn.Module | None = root
    for part in filter(None, parent.split(".")):
        holder = holder._modules.get(part) if holder is not None else None
    taken = set() if holder is None else {*vars(holder), *holder._modules, *holder._parameters, *holder._buffers}
    return join(parent, next(found for number in itertools.count() if (found := f"{name}_{number}") not in taken))
