"""Clamps with tensors as limits, in mode fx: the clamped tensor is quantized, and the limits are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Example, Recipe, convert, prepare
from qat_lightning.numerics.sqnr import sqnr_db
from tests.support.exactness import EXACT

Clamp = Callable[[Tensor, Tensor, Tensor], Tensor]

CLAMPS: dict[str, Clamp] = {
    "function": torch.clamp,
    "method": lambda x, low, high: x.clamp(low, high),
    "by name": lambda x, low, high: torch.clamp(x, min=low, max=high),
    "clip": torch.clip,
    "one after the other": lambda x, low, high: torch.clamp_max(torch.clamp_min(x, low), high),
    "of two tensors": lambda x, low, high: torch.minimum(torch.maximum(x, low), high),
}


class Clipped(nn.Module):
    """A linear layer with input and output clipped to limits in buffers, which may be infinite."""

    def __init__(self, clamp: Clamp, limit: float, *, learned: bool) -> None:
        super().__init__()
        self.clamp = clamp
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        for name, value in (("low", -limit), ("high", limit)):
            made = torch.tensor(value)
            if learned:
                self.register_parameter(name, nn.Parameter(made))
            else:
                self.register_buffer(name, made)

    def forward(self, x: Tensor) -> Tensor:
        x = self.clamp(x, self.low, self.high)
        return self.head(self.clamp(self.linear(x), self.low, self.high))


@pytest.mark.parametrize("limit", [math.inf, 0.5])
@pytest.mark.parametrize("how", list(CLAMPS))
def test_layers_between_clamps_are_int8_whatever_their_limits(how: str, limit: float) -> None:
    torch.manual_seed(0)
    network = Clipped(CLAMPS[how], limit, learned=False)
    x = torch.randn(64, 8)
    prepared = prepare(network, Example((x,)), Recipe("fx", EXACT))
    prepared.train()(x).sum().backward()
    prepared.eval()
    int8 = convert(prepared, Example((x,)))
    assert [row.quantized for row in int8.coverage] == [True, True]
    with torch.no_grad():
        assert sqnr_db(prepared(x), int8(x)) > 60
    assert not any("no finite range" in row.reason for row in int8.operations)


def test_limits_that_are_learned_keep_their_gradients() -> None:
    torch.manual_seed(0)
    network = Clipped(torch.clamp, 0.5, learned=True)
    x = torch.randn(64, 8)
    prepared = prepare(network, Example((x,)), Recipe("fx", EXACT))
    prepared.train()(x).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs() > 0 for parameter in (network.low, network.high))
    rows = convert(prepared.eval(), Example((x,))).operations
    clamps = [row for row in rows if row.kind == "clamp"]
    assert clamps
    assert {row.reason for row in clamps} == {"its limits are tensors, which its int8 kernel does not support"}
