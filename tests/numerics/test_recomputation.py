"""Activation checkpointing: supported in mode eager; an error where a graph would lose it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe

WAYS = ("plain", "reentrant", "sequential", "nested")


class Parts(nn.Module):
    """A part that runs three times on tensors with different ranges, and one that begins inside a chain."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.part = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 1)
        self.tail = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 4)

    def run(self, part: Any, x: Tensor) -> Tensor:
        return part(x) if self.way == "none" else checkpoint(part, x, use_reentrant=self.way == "reentrant")

    def twice(self, x: Tensor) -> Tensor:
        return self.run(self.part, 3 * self.part(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.run(self.twice, x) if self.way == "nested" else self.twice(x)
        if self.way == "sequential":
            x = checkpoint_sequential(self.part, 2, x, use_reentrant=False)
        else:
            x = self.run(self.part, x)
        return self.head(self.run(self.tail, self.conv(x)).mean((2, 3)))


def trained(way: str) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Gradients of three steps with two forward passes each, and the ranges after them."""
    torch.manual_seed(0)
    example = Example((torch.randn(4, 3, 8, 8),))
    prepared = get_mode("eager").prepare(Parts(way), example, Recipe("eager", "x86")).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    gradients = []
    for step in range(1, 4):
        batch = torch.randn(4, 3, 8, 8)
        (prepared(batch * step).square().mean() + prepared(batch * 3 * step).square().mean()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in prepared.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    ranges = {
        f"{name}.{key}": value
        for name, module in prepared.named_modules()
        if isinstance(module, FakeQuantize)
        for key, value in module.state_dict().items()
    }
    return gradients, ranges


@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_ranges_are_those_without(way: str) -> None:
    wanted, ranges = trained("none")
    gradients, found = trained(way)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, ranges, rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize("way", WAYS)
def test_a_graph_would_lose_it(mode: str, way: str) -> None:
    with pytest.raises(TraceError, match=rf"test_recomputation.*mode='{mode}'.*use mode='eager'"):
        get_mode(mode).prepare(Parts(way), Example((torch.randn(4, 3, 8, 8),)), Recipe(mode, "x86"))


def test_what_stays_float_as_a_whole_may_have_it_in_fx() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.parts = nn.Conv2d(3, 3, 1), Parts("plain")

        def forward(self, x: Tensor) -> Tensor:
            return self.parts(self.conv(x))

    recipe = Recipe("fx", "x86", exclude=("parts",))
    prepared = get_mode("fx").prepare(Outer(), Example((torch.randn(4, 3, 8, 8),)), recipe).train()
    prepared(torch.randn(4, 3, 8, 8)).sum().backward()
    assert prepared.conv.weight.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_whole_graph_may_be_computed_anew_from_outside(reentrant: bool) -> None:
    def step(anew: bool) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        x = torch.randn(4, 3, 8, 8, requires_grad=True)
        prepared = get_mode("fx").prepare(network, Example((x.detach(),)), Recipe("fx", "x86")).train()
        y = checkpoint(prepared, x, use_reentrant=reentrant) if anew else prepared(x)
        y.square().mean().backward()
        moved = [m.batches for m in prepared.modules() if isinstance(m, FakeQuantize) and m.observed]
        return [parameter.grad for parameter in prepared.parameters()], moved

    torch.testing.assert_close(step(True), step(False))
