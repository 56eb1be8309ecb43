"""timm's model families, and the smallest network of each."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def declare_torchvision_ops() -> None:
    """Declare the two ops without which a torchvision built for another torch cannot be imported."""
    importlib.util.find_spec("torchvision")  # the environment may declare them itself at the first lookup
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):  # declared by a torchvision that loads, or by this environment
            library.define(schema)
    _kept.append(library)


_kept: list[Any] = []  # garbage collection of a library removes its ops


class _TooLarge(Exception):
    """The network has more parameters than the smallest one so far."""


@contextlib.contextmanager
def _counting(limit: int) -> Iterator[list[int]]:
    """Count parameters as they are registered; raise `_TooLarge` above a limit."""
    registered, plain = [0], nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        plain(self, name, param)
        registered[0] += 0 if param is None else param.numel()
        if registered[0] > limit:
            raise _TooLarge

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield registered
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


@dataclass(frozen=True)
class Smallest:
    """The smallest network of a family.

    Attributes:
        name: Its name in timm.
        parameters: Number of parameters.
    """

    name: str
    parameters: int


def smallest_of(family: str) -> Smallest:
    """Return the smallest network that a module of timm defines.

    Networks are built on the meta device, and only until they are larger than the smallest so far.
    """
    import timm

    best: Smallest | None = None
    for name in timm.list_models(module=family, pretrained=False):
        limit = best.parameters if best else 10**12
        try:
            with warnings.catch_warnings(), torch.device("meta"), _counting(limit) as registered:
                warnings.simplefilter("ignore")
                timm.create_model(name, pretrained=False)
        except _TooLarge:
            continue
        except (RuntimeError, NotImplementedError):  # its construction needs values
            with warnings.catch_warnings(), _counting(limit) as registered, contextlib.suppress(_TooLarge):
                warnings.simplefilter("ignore")
                timm.create_model(name, pretrained=False)
            if registered[0] > limit:
                continue
        if best is None or registered[0] < best.parameters:
            best = Smallest(name, registered[0])
    assert best is not None, f"timm lists no network of {family}"
    return best


def build(name: str, small: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network with random weights, and the shape of one input.

    Args:
        name: Its name in timm.
        small: Whether to use inputs of 96x96 if the network supports them.
    """
    import timm

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False)
    cfg = network.default_cfg
    size = tuple(cfg["input_size"])
    if small and not cfg.get("fixed_input_size", False):
        shape = (size[0], 96, 96)
        try:
            with torch.no_grad():
                network.eval()(torch.zeros(2, *shape))
            size = shape
        except (RuntimeError, AssertionError):
            pass  # a network with a fixed input size
    return network.train(), size
