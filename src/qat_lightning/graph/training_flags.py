"""Which parts of a network train and which evaluate, and networks that decide it themselves.

A network may override ``train`` to keep BatchNorm in evaluation, say. In the graph modes another network takes its
place, which sets the flags of its layers as the float network would have set them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from qat_lightning.numerics.fake_quantize import FakeQuantize


def training_flags(network: nn.Module) -> dict[str, bool]:
    """Of each module by its name, whether it trains."""
    return {name: module.training for name, module in network.named_modules(remove_duplicate=False)}


def set_training_flags(network: nn.Module, flags: Mapping[str, bool]) -> None:
    """Set the flags of the modules that are named, and of those in them that are not; of fake-quant none.

    Args:
        network: A network that has modules which the one that the flags are of does not have.
        flags: By name; the network's own name is ``""``.
    """
    for name, module in network.named_modules(remove_duplicate=False):
        if not isinstance(module, FakeQuantize):
            module.training = flags[_nearest(name, flags)]


@contextmanager
def flags_kept(*roots: nn.Module) -> Iterator[list[nn.Module]]:
    """Put every module's flag back when the block ends, one by one: a part that evaluates by itself goes on doing so.

    Args:
        roots: Networks, with all that is in them.

    Yields:
        The modules.
    """
    flags = {module: module.training for root in roots for module in root.modules()}
    try:
        yield list(flags)
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """All modules in evaluation within the block, flag by flag: exported graphs refuse ``eval()``."""
    with flags_kept(*roots) as modules:
        for module in modules:
            module.training = False
        yield


def overrides_train(network: nn.Module) -> bool:
    """Whether a part of a network decides itself what trains."""
    return any(type(module).train is not nn.Module.train for module in network.modules())


@contextmanager
def parts_keep_training(network: nn.Module) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Within the block, prepare a network; parts of it that evaluate while it trains go on doing so.

    Args:
        network: The float network. Modes call its ``train``, which is to reach all of its parts.

    Yields:
        What to give the prepared network to; returns it.
    """
    flags = training_flags(network)

    def keep(prepared: nn.Module) -> nn.Module:
        # A network that evaluates as a whole, as it was loaded, is trained all the same.
        if flags[""] and not all(flags.values()):
            set_training_flags(prepared, flags)
        return prepared

    with plain_train(network):
        yield keep


@contextmanager
def plain_train(network: nn.Module) -> Iterator[None]:
    """Within the block, ``train`` and ``eval`` of a network reach all its parts, whatever their classes override."""
    overriding = {
        cls
        for module in network.modules()
        if type(module).train is not nn.Module.train
        for cls in type(module).__mro__
        if "train" in vars(cls) and cls is not nn.Module
    }
    kept: dict[type, Any] = {cls: vars(cls)["train"] for cls in overriding}
    for cls in kept:
        cls.train = nn.Module.train  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for cls, train in kept.items():
            cls.train = train  # type: ignore[attr-defined]


def _nearest(name: str, flags: Mapping[str, bool]) -> str:
    """The innermost named module that a name is in."""
    while name not in flags:
        name = name.rpartition(".")[0]
    return name
