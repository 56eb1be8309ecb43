"""Operands of additions and products in mode fx, explicit sizes, and mixed precision."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe


class Between(nn.Module):
    """An operation between two layers."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between
        self.gain, self.row = nn.Parameter(torch.tensor(-0.7)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        """Compute."""
        y: Tensor = self.last(self.between(self, self.first(x)))
        return y


EXAMPLE = Example((torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0)),))

OPERANDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no dimensions, computed": lambda m, x: x * m.first.weight.square().sum(),
    "no dimensions, first": lambda m, x: m.first.weight.square().sum() * x,
    "a parameter without dimensions": lambda m, x: m.gain + x,
    "of the activation": lambda m, x: x * x.mean(),
    "of parameters": lambda m, x: m.row.exp() * x,
    "smaller first": lambda m, x: x.amax(1, keepdim=True) + x,
    "smaller first, with a ReLU": lambda m, x: torch.mul(x.amax(1, keepdim=True), x).relu(),
}


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
@pytest.mark.parametrize("way", OPERANDS)
def test_operands_that_are_broadcast_are_int8(way: str, backend: str) -> None:
    torch.manual_seed(0)
    found = rehearse(Between(OPERANDS[way]), EXAMPLE, Recipe("fx", backend))
    assert not found.left_float
    assert [row.quantized for row in found.coverage if row.kind in ("add", "mul")] == [True]


SCALED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "added": lambda m, x: torch.add(x, x * x, alpha=2),
    "added by name": lambda m, x: torch.add(input=x, other=x * x, alpha=2),
    "added, with a ReLU": lambda m, x: torch.add(x, x * x, alpha=2).relu(),
    "subtracted": lambda m, x: torch.sub(input=x, other=x * x, alpha=2),
    "by a method": lambda m, x: x.add(x * x, alpha=2),
}


@pytest.mark.parametrize("way", SCALED)
def test_an_addition_with_a_factor_stays_float_between_int8_layers(way: str) -> None:
    torch.manual_seed(0)
    found = rehearse(Between(SCALED[way]), EXAMPLE, Recipe("fx", "x86"))
    assert not found.left_float
    assert all(row.quantized for row in found.coverage if row.kind in ("Linear", "mul"))
    sums = [row for row in found.coverage if row.kind in ("add", "sub")]
    assert [row.quantized for row in sums] == [False]
    if way.startswith("added"):
        assert "alpha=" in sums[0].reason


def test_a_factor_of_one_changes_nothing() -> None:
    found = rehearse(Between(lambda m, x: torch.add(x, x * x, alpha=1)), EXAMPLE, Recipe("fx", "x86"))
    assert all(row.quantized for row in found.coverage)


@pytest.mark.parametrize("way", ["smaller first", "smaller first, with a ReLU", "a parameter without dimensions"])
def test_the_larger_operand_comes_first_in_the_kernel(way: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Otherwise torch warns of a resized result."""
    prepared = get_mode("fx").prepare(Between(OPERANDS[way]), EXAMPLE, Recipe("fx", "x86"))
    prepared(*EXAMPLE.args)
    converted = get_mode("fx").convert(prepared.eval(), EXAMPLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted.network(*EXAMPLE.args)
    assert "resized" not in capfd.readouterr().err


def test_a_transposed_convolution_that_is_given_its_size_says_so() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 3, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(self.conv(x), output_size=[8, 8])
            return y

    found = rehearse(Up(), Example((torch.randn(2, 3, 8, 8),)), Recipe("fx", "x86"))
    (row,) = [row for row in found.coverage if row.name == "up"]
    assert not row.quantized
    assert row.reason.startswith("it is called with output_size=")
    assert not found.left_float


def in_bfloat16(network: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return network.first(x).float()


def without(network: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y: Tensor = network.first(x.float())
        return y


def test_mixed_precision_in_a_forward_is_refused_with_what_to_write() -> None:
    with pytest.raises(TraceError, match=r"turns on torch.autocast\('cpu', dtype=torch.bfloat16\).*enabled=False"):
        get_mode("fx").prepare(Between(in_bfloat16), EXAMPLE, Recipe("fx", "x86"))
    assert rehearse(Between(without), EXAMPLE, Recipe("fx", "x86")).int8_macs == 1
