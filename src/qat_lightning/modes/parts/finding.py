"""Finding the submodules that a mode can capture, if it cannot capture the whole network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qat_lightning.errors import ConfigurationError, MissingExtraError, first_line
from qat_lightning.graph.buffers import buffers_copied
from qat_lightning.graph.example import Example
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.modes.prepared import copy_of_modules
from qat_lightning.modes.tracing import same_results

Attempt = Callable[[str, nn.Module, list[Example]], object]
"""Prepares a copy of a module, given its name and its calls; raises an error to refuse it."""


@dataclass(frozen=True)
class Found:
    """The result of a search for parts.

    Attributes:
        parts: The largest submodules that can be captured, by their first names, with their calls in one call of the
            network.
        refused: The modules that were tried, refused and searched further, and why.
    """

    parts: dict[str, list[Example]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def find_parts(network: nn.Module, example: Example, attempt: Attempt) -> Found:
    """Try the children of a network; if one is refused, try its children, and so on.

    A module is not taken if code outside uses more of it than its ``forward``, because nothing else is left of it in a
    graph.

    Args:
        network: Not changed; copies are tried.
        example: One call of it.
        attempt: Prepares a module.
    """
    search = _Search(network, example, attempt)
    for name, module in network.named_children():
        search.visit(name, module)
    return search.found


class _Search:
    """One search for parts: a recorded run of the network, and the parts found so far."""

    def __init__(self, network: nn.Module, example: Example, attempt: Attempt) -> None:
        self.network, self.example, self.attempt = network, example, attempt
        self.calls = catch_calls(network, example)
        self.wanted = run_apart(network, example)
        self.names = _names(network)
        self.found, self._seen = Found(), set[nn.Module]()

    def visit(self, name: str, module: nn.Module) -> None:
        """Take a module, or try its children."""
        if module in self._seen or next(module.parameters(), None) is None:
            return
        self._seen.add(module)
        if name in self.calls:
            why = self._why_not(name, module)
            if not why:
                self.found.parts[name] = self.calls[name]
                return
            self.found.refused[name] = why
        for child, inner in module.named_children():
            self.visit(f"{name}.{child}", inner)

    def _why_not(self, name: str, module: nn.Module) -> str:
        why = _shared(module, self.names)
        if why:
            return why
        try:
            self.attempt(name, copy.deepcopy(module), self.calls[name])
        except (ConfigurationError, MissingExtraError):
            raise  # not the module's fault
        except Exception as error:  # noqa: BLE001 - upstream may fail in any way
            return str(error) or type(error).__name__
        return _needed_beside_forward(self.network, name, len(self.calls[name]), self.example, self.wanted)


def catch_calls(network: nn.Module, example: Example, only: Collection[str] | None = None) -> dict[str, list[Example]]:
    """Record the calls of modules in one run of a copy of ``network``, in evaluation, by their first names, in order.

    Args:
        network: Not changed.
        example: One call of it.
        only: Names of the modules to record; None for all.
    """
    copied = copy.deepcopy(network)
    calls: dict[str, list[Example]] = {}
    for name, module in copied.named_modules():

        def catch(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], name: str = name) -> None:
            # Copied, because later ops may write into the input.
            calls.setdefault(name, []).append(Example(*copy.deepcopy((args, kwargs))))

        if only is None or name in only:
            module.register_forward_pre_hook(catch, with_kwargs=True)
    run_apart(copied, example)
    return calls


def replace_modules(network: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace some submodules of a network, under all of their names."""
    for module in list(network.modules()):
        for name, child in module._modules.items():
            if child is not None and child in replacements:
                module._modules[name] = replacements[child]


class _Sealed(nn.Module):
    """Replaces a part, and exposes only its ``forward``."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.__dict__["_inside"] = part
        self.__dict__["_count"] = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the part."""
        self.__dict__["_count"] += 1
        return self.__dict__["_inside"](*args, **kwargs)


def _needed_beside_forward(network: nn.Module, name: str, count: int, example: Example, wanted: Any) -> str:
    """What code outside of a module uses of it besides its ``forward``; empty if nothing."""
    copied = copy_of_modules(network).eval()
    part = copied.get_submodule(name)
    sealed = _Sealed(part)
    replace_modules(copied, {part: sealed})
    try:
        with buffers_copied(part):
            got = run_apart(copied, example)
    except Exception as error:  # noqa: BLE001 - code that does not find what it needs may fail in any way
        return f"code outside of it also uses attributes other than its forward ({first_line(error)})"
    if sealed.__dict__["_count"] != count or not same_results(wanted, got):
        return "code outside of it does not reach it by its name and call its forward"
    return ""


def _names(network: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _shared(module: nn.Module, names: Mapping[nn.Module, list[str]]) -> str:
    """The module within this one that is also used elsewhere in the network; empty if there is none."""
    own = tuple(f"{name}." for name in names[module])
    for inner in module.modules():
        if inner is module or next(inner.parameters(), None) is None:
            continue
        other = next((name for name in names[inner] if not f"{name}.".startswith(own)), None)
        if other is not None:
            return f"it contains {names[inner][0]!r}, which is also used outside of it, as {other!r}"
    return ""
