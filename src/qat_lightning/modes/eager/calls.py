"""Layers that a forward pass calls several times: each call has its own grids, in order.

The head of a detector is called on levels of different sizes, and a common grid would leave only a few steps for the
smallest. The weight and its grid are shared; a kernel gets the grids of input and output with each call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.numerics.fake_quantize import FakeQuantize

MOST_CALLS = 8
"""A layer that the example calls more often, such as an unrolled cell, has one pair of grids for all calls."""

LATER = "later_calls"
"""The child of a layer that holds the grids of its second and later calls."""

_ROLES = ("input_fake_quant", "output_fake_quant")


class Grids(nn.Module):
    """The FakeQuantizes of input and output in the second or a later call of a layer.

    Args:
        number: Index of the call, from 0.
        input_fake_quant: For the input.
        output_fake_quant: For the output of the layer's chain.
    """

    input_fake_quant: FakeQuantize
    output_fake_quant: FakeQuantize

    def __init__(self, number: int, input_fake_quant: nn.Module, output_fake_quant: nn.Module) -> None:
        super().__init__()
        self.number = number
        self.input_fake_quant = input_fake_quant  # type: ignore[assignment]
        self.output_fake_quant = output_fake_quant  # type: ignore[assignment]


def layer_of(name: str) -> tuple[str, int]:
    """The layer that grids belong to, and the index of the call, from the name of the module that holds them.

    Example:
        >>> layer_of("net.head.later_calls.0"), layer_of("net.head")
        (('net.head', 1), ('net.head', 0))
    """
    layer, found, later = f".{name}".rpartition(f".{LATER}.")
    return (layer[1:], int(later) + 1) if found else (name, 0)


def adapt_entries(head: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Adapt entries of a layer to another number of calls: grids of new calls are copied from the first call.

    Args:
        head: The layer.
        state_dict: The ``state_dict`` to be loaded; changed in place.
        prefix: Prefix of its entries.
    """
    grids: Any = head._modules.get(LATER, ())
    later = len(grids)
    stored = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    for key, value in stored.items():
        inner = key.removeprefix(prefix)
        if inner.startswith(f"{LATER}.") and int(inner.split(".")[1]) >= later:
            del state_dict[key]
        elif inner.startswith(_ROLES) and inner.partition(".")[0] in _ROLES:
            for number in range(later):
                state_dict.setdefault(f"{prefix}{LATER}.{number}.{inner}", value)


class _Here(threading.local):
    """The calls so far of the layers whose network runs in this thread."""

    def __init__(self) -> None:
        self.calls: dict[CountsCalls, int] = {}


_here = _Here()


class CountsCalls:
    """Counts the calls of a layer within a forward pass of the network; outside of one, every call is the first.

    Each thread counts on its own: several of them may run an int8 network at the same time.
    """

    @property
    def calls_so_far(self) -> int | None:
        """The number of calls in the forward pass of this thread; None outside of one."""
        return _here.calls.get(self)

    @calls_so_far.setter
    def calls_so_far(self, calls: int | None) -> None:
        if calls is None:
            _here.calls.pop(self, None)
        else:
            _here.calls[self] = calls

    def begin_forward(self, within: bool) -> None:
        """Start counting at the begin of a forward pass, or stop at its end."""
        self.calls_so_far = 0 if within else None

    def next_call(self, known: int) -> int:
        """The index of the coming call; calls beyond those with grids count as the last one with grids."""
        if known <= 1 or (so_far := self.calls_so_far) is None:
            return 0
        self.calls_so_far = so_far + 1
        return min(so_far, known - 1)


def count_in(network: nn.Module) -> None:
    """Let the layers of an int8 network count their calls within its forward."""
    network.register_forward_pre_hook(_begins, prepend=True)
    network.register_forward_hook(_ends, always_call=True)


def _begins(network: nn.Module, args: Any) -> None:
    for layer in _counting(network):
        layer.begin_forward(True)


def _ends(network: nn.Module, args: Any, output: Any) -> None:
    for layer in _counting(network):
        layer.begin_forward(False)


def _counting(network: nn.Module) -> Iterator[CountsCalls]:
    return (module for module in network.modules() if isinstance(module, CountsCalls))


def grids_of(fakes: Any) -> Tensor:
    """Scale and zero point of input and output, in the form that an int8 layer stores: float64, shape ``(4,)``.

    Args:
        fakes: Module with the two FakeQuantizes; the input's scale is 0 if it was never observed.
    """
    found = [torch.zeros((), dtype=torch.float64)] * 2
    if fakes.input_fake_quant.seen:
        found = [value.double() for value in fakes.input_fake_quant.calculate_qparams()]
    found += [value.double() for value in fakes.output_fake_quant.calculate_qparams()]
    return torch.stack([value.detach().reshape(()).cpu() for value in found])
