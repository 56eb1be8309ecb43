"""Blocks of a network: repeated ones for distillation, and all blocks for learning by blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.scopes import dotted
from qat_lightning.recipes.layers import RECONSTRUCTED
from qat_lightning.rehearsal.calibration import call


def repeated_blocks(network: nn.Module) -> tuple[str, ...]:
    """The names of the repeated blocks of a network.

    They are the children of an ``nn.ModuleList`` (or an ``nn.Sequential`` of at least two) of modules of one class that
    contain layers; of several such lists, the one with the most parameters.

    Args:
        network: A float network.

    Returns:
        Names relative to the network, in order.

    Raises:
        ConfigurationError: There is no such list.

    Example:
        >>> blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))
        >>> repeated_blocks(nn.ModuleDict({"blocks": blocks, "head": nn.Linear(8, 2)}))
        ('blocks.0', 'blocks.1')
    """
    lists = {name: module for name, module in network.named_modules() if _is_list_of_blocks(module)}
    if not lists:
        raise ConfigurationError(
            f"features='blocks' finds no list of repeated blocks in {type(network).__name__} (an nn.ModuleList, or an "
            "nn.Sequential, of modules of one class): name the modules to compare, features=[...]."
        )
    largest = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return tuple(f"{largest}.{name}" if largest else name for name, _ in lists[largest].named_children())


def _is_list_of_blocks(module: nn.Module) -> bool:
    children = list(module.children())
    least = {nn.ModuleList: 1, nn.Sequential: 2}.get(type(module))
    if least is None or len(children) < least:
        return False
    return len({type(child) for child in children}) == 1 and all(_has_layers(child) for child in children)


def _has_layers(block: nn.Module) -> bool:
    return any(True for _ in block.children()) and any(True for _ in block.parameters())


def found_blocks(network: nn.Module) -> tuple[str, ...]:
    """The blocks of a network, found by its structure: residual blocks, transformer layers and the like.

    A block is a submodule with at least two convolutions or linear layers that is not a list of modules, and does not
    contain a list of such submodules. The whole network is not a block.

    Args:
        network: A float network.

    Returns:
        Names relative to the network, in order; none is inside another.

    Example:
        >>> layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))
        >>> found_blocks(nn.ModuleDict({"encoder": layers, "head": nn.Linear(8, 2)}))
        ('encoder.0', 'encoder.1')
    """
    return tuple(_found_in(network, ""))


def _found_in(module: nn.Module, name: str) -> Iterator[str]:
    for key, child in module.named_children():
        inner = f"{name}.{key}" if name else key
        if _counted(child) < 2:
            continue
        if _is_list(child) or any(_lists_blocks(deeper) for deeper in child.modules()):
            yield from _found_in(child, inner)
        else:
            yield inner


def _lists_blocks(module: nn.Module) -> bool:
    """Whether a module is a list of at least two submodules that could be blocks."""
    if not _is_list(module):
        return False
    return sum(_counted(child) >= 2 and not _is_list(child) for child in module.children()) >= 2


def _counted(module: nn.Module) -> int:
    return sum(type(inner) in RECONSTRUCTED for inner in module.modules())


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def blocks_of(network: nn.Module, batch: Any, wanted: str | Sequence[str], prefix: str = "") -> tuple[str, ...]:
    """The blocks whose layers are to be learned together.

    Args:
        network: A float network, in evaluation mode.
        batch: A call of it.
        wanted: ``"none"``; ``"auto"`` for blocks of `found_blocks` that the network calls once; or names relative to
            the LightningModule.
        prefix: The network's name in the LightningModule. Names in other networks are ignored.

    Returns:
        Names relative to the network.

    Raises:
        ConfigurationError: A name is not a submodule, is inside another one, contains no convolution or linear layer,
            or is not called exactly once; the message says which.

    Example:
        >>> network = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 2))
        >>> blocks_of(network, torch.zeros(1, 4), ["net.0"], "net")
        ('0',)
    """
    if wanted == "none":
        return ()
    if isinstance(wanted, str):
        found = found_blocks(network)
        counts = _counts(network, found, batch)
        return tuple(name for name in found if counts[name] == 1)
    start = dotted(prefix)
    names = tuple(name.removeprefix(start) for name in wanted if name.startswith(start))
    _check_named(network, names, start)
    counts = _counts(network, names, batch)
    for name in names:
        if counts[name] != 1:
            raise ConfigurationError(
                f"adaround.blocks={start + name!r} is called {counts[name]} times in one call of the network, and a "
                "block is compared by the output of its only call: name submodules that are called once."
            )
    return names


def _check_named(network: nn.Module, names: Sequence[str], start: str) -> None:
    modules = dict(network.named_modules())
    some = ", ".join(repr(start + name) for name in found_blocks(network)[:4]) or "none; use adaround.blocks='none'"
    for name in names:
        around = next((other for other in names if name.startswith(f"{other}.")), None)
        what = ""
        if name not in modules or not name:
            what = "is no submodule of the network"
        elif around is not None:
            what = f"is inside {start + around!r}, which is named as well"
        elif not _counted(modules[name]):
            what = "holds no convolution and no linear layer"
        if what:
            raise ConfigurationError(f"adaround.blocks={start + name!r} {what}. Blocks that were found: {some}.")


@torch.no_grad()
def _counts(network: nn.Module, names: Sequence[str], batch: Any) -> dict[str, int]:
    """Number of calls of submodules in one call of the network."""
    counts = dict.fromkeys(names, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            counts[name] += 1

        return hook

    handles = [network.get_submodule(name).register_forward_pre_hook(count(name)) for name in names]
    try:
        call(network, batch)
    finally:
        for handle in handles:
            handle.remove()
    return counts
