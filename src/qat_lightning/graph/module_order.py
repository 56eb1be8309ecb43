"""The order of children, parameters and buffers: optimizers and weight averages rely on it to match their entries."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

from torch import Tensor, nn

_TABLES = ("_parameters", "_buffers", "_modules")

Named = Literal["named_parameters", "named_buffers"]
_NAMED: tuple[Named, ...] = ("named_parameters", "named_buffers")


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


class NamedFirst:
    """Replaces ``named_parameters`` or ``named_buffers`` of one module: some tensors come before all others.

    ``parameters()`` and ``buffers()`` follow it. It is set on the instance, whose class stays the user's.

    Args:
        module: The module.
        method: Which of the two it replaces.
        names: Names of the tensors that come first, in the order of the module tree.
    """

    def __init__(self, module: nn.Module, method: Named, names: Collection[str]) -> None:
        self.module, self.method, self.names = module, method, frozenset(names)

    @property
    def __func__(self) -> Any:
        """The function behind the usual method, which `torch.compile` compares."""
        return getattr(type(self.module), self.method)

    def __call__(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """See `torch.nn.Module.named_parameters`."""
        pairs = self.__func__(self.module, prefix=prefix, recurse=recurse, remove_duplicate=remove_duplicate)
        start = f"{prefix}." if prefix else ""
        return iter(sorted(pairs, key=lambda pair: pair[0].removeprefix(start) not in self.names))


def name_first(module: nn.Module, other: nn.Module) -> None:
    """Let ``parameters()`` and ``buffers()`` of ``module`` and its submodules begin with the tensors of ``other``.

    So that pairing them by position, as averages of weights do, pairs the same tensors in both.
    """
    own = dict(module.named_modules(remove_duplicate=False))
    for path, counterpart in other.named_modules():
        if path not in own or not counterpart._modules:
            continue
        for method in _NAMED:
            names = [name for name, _ in getattr(counterpart, method)(remove_duplicate=False)]
            own[path].__dict__[method] = NamedFirst(own[path], method, names)


def list_parameters_as_usual(module: nn.Module) -> None:
    """Undo `name_first` for parameters."""
    for inner in module.modules():
        inner.__dict__.pop("named_parameters", None)


def _arrange(table: dict[str, Any], names: Iterable[str]) -> None:
    """In place, since a LightningModule quantized through its own forward may share the table with the network."""
    first = {name: table[name] for name in names if name in table}
    rest = {name: value for name, value in table.items() if name not in first}
    table.clear()
    table.update(first | rest)
