"""Places without any finite value in training stay float and are named; the rest is int8."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.artifact import artifact_bytes, quantized_from_bytes
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.backends import BACKENDS, pairs
from qat_lightning.settings.recipe import Recipe

pytestmark = pytest.mark.usefixtures("without_compiler")


class MaskedAttention(nn.Module):
    """An additive mask contains -inf, and so does its sum with the scores, in every batch."""

    batch = (torch.randn(4, 6, 8), torch.full((6, 6), -math.inf).triu(1))
    layers = ("query", "key", "value", "head")

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = torch.matmul(self.query(x), self.key(x).transpose(-1, -2)) + mask
        return self.head(torch.matmul(scores.softmax(-1), self.value(x)).relu())


class LinearOnNothing(nn.Module):
    """One of two inputs is never finite."""

    batch = (torch.randn(4, 8), torch.full((4, 8), math.nan))
    layers = ("good", "head")
    floats = ("plain", "fused.0")

    def __init__(self) -> None:
        super().__init__()
        self.good, self.plain, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.fused = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.good(x).relu() + self.fused(self.plain(y)).nan_to_num(0.0))


class ConvolutionOnNothing(nn.Module):
    batch = (torch.randn(4, 1, 6, 6), torch.full((4, 1, 6, 6), math.inf))
    layers = ("good", "head")
    floats = ("part.0",)

    def __init__(self) -> None:
        super().__init__()
        self.good, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 4)
        self.part = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.good(x).relu() + self.part(y).nan_to_num(0.0)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [MaskedAttention, LinearOnNothing, ConvolutionOnNothing])
@pytest.mark.parametrize(("mode", "backend"), [pair for pair in pairs() if not BACKENDS[pair[1]].own_grids])
def test_what_was_never_seen_stays_float(mode: str, backend: str, make: Any) -> None:
    torch.manual_seed(0)
    network, example, recipe = make(), Example(make.batch), Recipe(mode, backend)
    prepared = get_mode(mode).prepare(copy.deepcopy(network), example, recipe)
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    prepared.train()
    for _ in range(3):
        prepared(*example.args)
    converted = get_mode(mode).convert(cpu_copy(prepared), example)
    rows = {row.name: row for row in converted.coverage}
    assert all(rows[name].quantized for name in make.layers)
    for name in getattr(make, "floats", ()):
        assert not rows[name].quantized
        assert "observed" in rows[name].reason
    quantized = QuantizedNetwork(converted, recipe, example)
    outputs = quantized(*example.args)
    with torch.no_grad():
        wanted = cpu_copy(prepared)(*example.args)
    assert torch.isfinite(outputs).all()
    # A rounding, here and there, of the layers that are int8.
    assert (outputs - wanted).abs().max() <= 0.03 * wanted.abs().max()
    again = quantized_from_bytes(artifact_bytes(quantized), network)
    assert torch.equal(again(*example.args), outputs)
