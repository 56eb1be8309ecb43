"""The order of children, parameters and buffers: optimizers and weight averages rely on it to match their entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")


def order_as(module: nn.Module, other: nn.Module) -> None:
    """Give ``module`` and its submodules the order of ``other``; what ``other`` does not have comes last."""
    for table in _TABLES:
        _arrange(module.__dict__[table], other.__dict__[table])
    for name, child in other._modules.items():
        own = module._modules.get(name)
        if child is not None and own is not None and own is not child:
            order_as(own, child)


def order_by_keys(module: nn.Module, keys: Iterable[str], prefix: str = "") -> None:
    """Give ``module`` and its submodules the order in which a ``state_dict`` was written.

    Args:
        module: Children without an entry keep their places, since a container calls its children in this order.
        keys: Keys of the ``state_dict``.
        prefix: Prefix of the keys of ``module``; other keys are ignored.
    """
    within = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    names = list(dict.fromkeys(key.partition(".")[0] for key in within))
    for table in _TABLES:
        present = module.__dict__[table]
        moved = iter([name for name in names if name in present])
        _arrange(present, [next(moved) if name in names else name for name in present])
    for name, child in module._modules.items():
        if child is not None:
            order_by_keys(child, within, f"{name}.")


def _arrange(table: dict[str, Any], names: Iterable[str]) -> None:
    """In place, since a LightningModule quantized through its own forward may share the table with the network."""
    first = {name: table[name] for name in names if name in table}
    rest = {name: value for name, value in table.items() if name not in first}
    table.clear()
    table.update(first | rest)
