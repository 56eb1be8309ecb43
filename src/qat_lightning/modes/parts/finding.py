"""Which submodules of a network a mode takes, where it does not take the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from qat_lightning.errors import QuantizationError
from qat_lightning.graph.example import Example


@dataclass(frozen=True)
class Found:
    """What a search for parts came to.

    Attributes:
        parts: The largest submodules that are taken, by name, with the calls that one call of the network makes.
        refused: The modules that were tried and descended into, and why; the whole is ``""``.
        uncalled: The submodules that hold parameters and were never called through ``forward``.
    """

    parts: dict[str, list[Example]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)


def find_parts(network: nn.Module, example: Example, attempt: Callable[[str, nn.Module, Example], object]) -> Found:
    """Try a network as a whole, and where it is refused its children, and so on down.

    Args:
        network: Tried on copies; left as it is.
        example: One call of it.
        attempt: Prepares a module, given its name and its first call; raises a `QuantizationError` to refuse it.
    """
    calls = catch_calls(network, example)
    found = Found()
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        if module in seen or next(module.parameters(), None) is None:
            return
        seen.add(module)
        if name not in calls:
            found.uncalled.append(name)
        else:
            try:
                attempt(name, copy.deepcopy(module), calls[name][0])
            except QuantizationError as error:
                found.refused[name] = str(error)
            else:
                found.parts[name] = calls[name]
                return
        for child, inner in module.named_children():
            visit(f"{name}.{child}" if name else child, inner)

    visit("", network)
    return found


def catch_calls(network: nn.Module, example: Example) -> dict[str, list[Example]]:
    """The calls of every module in one run of a copy of ``network``, by its first name, in their order."""
    copied = copy.deepcopy(network)
    calls: dict[str, list[Example]] = {}
    for name, module in copied.named_modules():

        def catch(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], name: str = name) -> None:
            # Copied, because what runs behind it may write into its input.
            calls.setdefault(name, []).append(Example(*copy.deepcopy((args, kwargs))))

        module.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        copied(*copy.deepcopy(example.args), **copy.deepcopy(example.kwargs))
    return calls
