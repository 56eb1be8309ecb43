"""Which parts of a network are in training mode, and networks that override ``train``.

A network may override ``train``, for example to keep BatchNorm in evaluation. In the graph modes another module takes
its place, and sets the flags of its layers as the float network would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from qat_lightning.numerics.fake_quantize import FakeQuantize


def training_flags(network: nn.Module) -> dict[str, bool]:
    """The training flag of each module, by name."""
    return {name: module.training for name, module in network.named_modules(remove_duplicate=False)}


def set_training_flags(network: nn.Module, flags: Mapping[str, bool]) -> None:
    """Set the flags of the named modules and of submodules without a name in ``flags``, except those of fake-quant.

    Args:
        network: A network that may have modules without an entry in ``flags``.
        flags: Flags by name; the network itself has the name ``""``.
    """
    for name, module in network.named_modules(remove_duplicate=False):
        if not isinstance(module, FakeQuantize):
            module.training = flags[_nearest(name, flags)]


@contextmanager
def flags_kept(*roots: nn.Module) -> Iterator[list[nn.Module]]:
    """Restore every module's flag at the end of the block, so that parts which are kept in evaluation stay there.

    Args:
        roots: Networks; their submodules are included.

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
    """All modules in evaluation within the block. Sets flags one by one, since exported graphs refuse ``eval()``."""
    with flags_kept(*roots) as modules:
        for module in modules:
            module.training = False
        yield


@contextmanager
def training(root: nn.Module) -> Iterator[None]:
    """A network in training within the block; its parts that are kept in evaluation while it trains stay there."""
    with flags_kept(root) as modules:
        if not root.training:  # as a whole, as after loading: it is trained nevertheless
            for module in modules:
                module.training = True
        yield


def overrides_train(network: nn.Module) -> bool:
    """Whether any module of a network overrides ``train``."""
    return any(type(module).train is not nn.Module.train for module in network.modules())


@contextmanager
def parts_keep_training(network: nn.Module) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Within the block, prepare a network so that parts which are kept in evaluation during training stay there.

    Args:
        network: The float network. Within the block, its ``train`` reaches all of its parts.

    Yields:
        A function to call with the prepared network; it returns that network.
    """
    flags = training_flags(network)

    def keep(prepared: nn.Module) -> nn.Module:
        # A network that is in evaluation as a whole, as after loading, is trained nevertheless.
        if flags[""] and not all(flags.values()):
            set_training_flags(prepared, flags)
        return prepared

    with plain_train(network):
        yield keep


@contextmanager
def plain_train(network: nn.Module) -> Iterator[None]:
    """Within the block, ``train`` and ``eval`` of a network reach all its parts, ignoring overrides."""
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
    """The innermost module with an entry in ``flags`` that contains ``name``."""
    while name not in flags:
        name = name.rpartition(".")[0]
    return name
