"""Plain attributes that a forward reads, which are constants of its graph: a change of one raises an error."""

from __future__ import annotations

import contextlib
import copy
import random
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.modes.plain_attributes import attributes_like, class_defaults, is_own, is_plain, plain_attributes
from qat_lightning.modes.prepared import copy_of_modules


@dataclass(frozen=True)
class Read:
    """An attribute that a forward read.

    Attributes:
        path: The module's name in the network; None if it is outside of it.
        name: The attribute.
        value: The value that it had.
        kind: The module's class, if the value is a default of it.
        owner: The module of the float network, which code may still hold after it was replaced.
    """

    path: str | None
    name: str
    value: Any
    kind: type | None
    owner: Callable[[], nn.Module | None]


def attributes_read(network: nn.Module, example: Example) -> tuple[list[Read], bool]:
    """The plain attributes that a network reads in training and in evaluation, and does not change itself.

    Args:
        network: The float network; it stays as it is.
        example: One call.

    Returns:
        The attributes, and whether the network changes any others.
    """
    copied = copy_of_modules(network)
    before, changes = attributes_like(copied, copied), False
    originals = dict(network.named_modules(remove_duplicate=False))
    paths = {id(module): path for path, module in copied.named_modules()}
    found: dict[tuple[int, str], tuple[nn.Module, Read]] = {}
    written: set[tuple[int, str]] = set()

    def note(module: nn.Module, name: str, value: Any) -> None:
        path = paths.get(id(module))
        owner = module if path is None else originals[path]
        if (id(module), name) not in found:
            kind = None if name in vars(module) else type(module)
            found[id(module), name] = module, Read(path, name, copy.deepcopy(value), kind, weakref.ref(owner))

    state = random.getstate()
    for training in (True, False):
        # What does not run in training, as a BatchNorm on a single value, is not traced either.
        with contextlib.suppress(Exception):
            run_apart(copied, example, _noting(copied, training, note, lambda *written_to: written.add(written_to)))
        random.setstate(state)
        changes = changes or attributes_like(copied, copied) != before
    # What forward itself assigns, or changes in place, is its own memory, and no setting of the network.
    reads = [
        read
        for key, (module, read) in found.items()
        if key not in written and bool(plain_attributes(module).get(read.name) == read.value)
    ]
    return reads, changes


@contextmanager
def _noting(
    network: nn.Module,
    training: bool,
    note: Callable[[nn.Module, str, Any], None],
    note_written: Callable[[int, str], object],
) -> Iterator[None]:
    """A call of a network, in which the plain attributes of modules that are read are noted, and all assigned ones."""
    network.train(training)
    assign = nn.Module.__setattr__

    def noting(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if is_own(name) and is_plain(value):
            own = object.__getattribute__(module, "__dict__")
            if name in own or name in class_defaults(type(module)):
                note(module, name, value)
        return value

    def assigning(module: nn.Module, name: str, value: Any) -> None:
        note_written(id(module), name)
        assign(module, name, value)

    nn.Module.__getattribute__ = noting  # type: ignore[method-assign, assignment]
    nn.Module.__setattr__ = assigning  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = assign  # type: ignore[method-assign]


class ReadAttributes:
    """Watches the attributes that the graph of a network has as constants.

    Args:
        reads: The attributes.
        live: Modules that the graph calls, which read their attributes themselves.
    """

    def __init__(self, reads: list[Read], live: Collection[str] = ()) -> None:
        inside = tuple(f"{path}." for path in live)
        self.reads = [read for read in reads if read.path not in live and not str(read.path).startswith(inside)]
        self._watched: list[tuple[Callable[[], nn.Module | None], Read]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadAttributes:
        """For a copy of the network: watches only the copy's own modules, from its first call."""
        return ReadAttributes([replace(read, owner=_nothing) for read in self.reads])

    def __reduce__(self) -> tuple[Any, ...]:
        """None: a file does not refer to the float network."""
        return type(None), ()

    def watch(self, network: nn.Module, float_network: nn.Module) -> None:
        """Watch the modules of the float network, and those that have their places in the network with the graph.

        Args:
            network: The network that runs the graph.
            float_network: The copy of the float network whose attributes it has.
        """
        modules = dict(network.named_modules(remove_duplicate=False))
        modules[None] = float_network  # lends the network its attributes
        self._watched = []
        for read in self.reads:
            holders = [] if read.path is None else [modules.get(read.path), *[modules[None]] * (read.path == "")]
            owners: list[Callable[[], nn.Module | None]] = [read.owner]
            # A graph may use the name for itself.
            owners += [weakref.ref(holder) for holder in holders if holder is not None and _has(holder, read)]
            self._watched += [(owner, read) for owner in owners]

    def refuse_changes(self, network: nn.Module, float_network: nn.Module) -> None:
        """Raise an error for an attribute that has another value than in the graph; see `watch`.

        Raises:
            NetworkError: There is one; the message names it and says what to do.
        """
        if self._watched is None:
            self.watch(network, float_network)
        for owner, read in self._watched or ():
            module = owner()
            if module is not None and not _has(module, read) and is_plain(_value(module, read)):
                raise _changed(float_network, read, _value(module, read))


def _nothing() -> None:
    """No module."""


def _has(module: nn.Module, read: Read) -> bool:
    """Whether a module has the value that was read, or none of its own."""
    value = _value(module, read)
    return value is read.value or bool(value == read.value)


def _value(module: nn.Module, read: Read) -> Any:
    if read.kind is None or read.name in vars(module) or type(module) is not read.kind:
        return vars(module).get(read.name, read.value)
    return getattr(read.kind, read.name, read.value)


def _changed(network: nn.Module, read: Read, now: Any) -> NetworkError:
    name = join(read.path or "", read.name)
    return NetworkError(
        f"{type(network).__name__} was prepared as a graph, in which the attribute {name!r} that forward reads is the "
        f"constant {read.value!r}. It is now {now!r}, which the graph would not follow. What to do: for a number, make "
        f"it a buffer, self.register_buffer({read.name!r}, torch.tensor(...)), and change it in place, "
        f"self.{read.name}.fill_(...); or use mode='eager', which runs forward itself."
    )
