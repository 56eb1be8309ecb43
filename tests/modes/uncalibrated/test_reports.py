"""Coverage of both kinds: layers that share a weight, and multiply-accumulates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.coverage import int8_share
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.recipe import Recipe

MODES = ["eager", "fx", "pt2e"]


pytestmark = pytest.mark.usefixtures("without_compiler")


class Shared(nn.Module):
    """Two layers with one weight, an embedding tied to the head, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(24, 16)
        self.first, self.second, self.idle = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.idle.weight = self.first.weight
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(F.relu(self.first(self.tokens(indices))))))


def shared(kind: str, *exclude: str) -> tuple[Converted, dict[str, bool], float]:
    network, indices = Shared().eval(), torch.randint(0, 24, (8, 6))
    made = quantize(network, Example((indices,)), Recipe("pt2e", "x86", kind=kind, exclude=exclude))
    wanted = network(indices).detach()
    error = float((made.network(indices).detach() - wanted).abs().max() / wanted.abs().max())
    return made, {row.name: row.quantized for row in made.coverage}, error


def test_pt2e_says_which_layers_with_one_weight_are_integer() -> None:
    made, rows, error = shared("dynamic")
    assert rows == {"tokens": False, "first": True, "second": True, "idle": False, "head": True}
    assert {check.name for check in made.checks} == {"first", "second", "head"}
    assert error < 0.05
    made, rows, error = shared("weight_only")
    assert rows == {"tokens": True, "first": True, "second": True, "idle": False, "head": True}
    assert {check.name for check in made.checks} == {"tokens", "first", "second", "head"}
    assert next(row.reason for row in made.coverage if row.name == "idle") == "not used by forward"
    assert error < 0.05


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
def test_pt2e_leaves_an_excluded_layer_float_whose_weight_another_has(kind: str) -> None:
    made, rows, _ = shared(kind, "first")
    assert not rows["first"]
    assert rows["second"]
    weights = {}
    for node in made.network.decomposed.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            weights[len(weights)] = node.args[1].op
    assert weights == {0: "get_attr", 1: "call_function", 2: "call_function"}


class Mixed(nn.Module):
    """One of each: a convolution, recurrence, attention, a linear layer, and products between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.own = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.rnn(self.conv(x.transpose(1, 2)).transpose(1, 2))[0]
        x = self.head(self.attention(x, x, x)[0])
        return F.linear(x, self.own) + (x @ x.transpose(1, 2)).sum(-1, keepdim=True)


LENGTH = 6
MACS = {
    "conv": LENGTH * 8 * 8 * 3,
    "rnn": LENGTH * 4 * 8 * (8 + 8),
    "attention": LENGTH * 4 * 8 * 8,
    "head": LENGTH * 8 * 4,
}
BETWEEN = LENGTH * LENGTH * 4 + 2 * LENGTH * LENGTH * 8
"""The product by hand, and the two of attention."""


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_dynamic_counts_what_is_multiplied_in_integers(mode: str) -> None:
    network = Mixed().eval()
    made = quantize(network, Example((torch.randn(2, LENGTH, 8),)), Recipe(mode, "x86", kind="dynamic"))
    rows = {row.name: row for row in made.coverage}
    assert {name: rows[name].macs for name in MACS} == MACS
    linear = LENGTH * 4 * 4
    assert [(row.what, row.quantized, row.macs) for row in made.operations] == [
        ("op", False, BETWEEN + (0 if mode == "fx" else linear))
    ]
    integer = sum(macs for name, macs in MACS.items() if rows[name].quantized) + (linear if mode == "fx" else 0)
    share = int8_share([*made.coverage, *made.operations])
    assert share == pytest.approx(integer / (sum(MACS.values()) + BETWEEN + linear))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("mode", MODES)
def test_weight_only_multiplies_nothing_in_integers(mode: str) -> None:
    made = quantize(Mixed(), Example((torch.randn(2, LENGTH, 8),)), Recipe(mode, "x86", kind="weight_only"))
    assert all(row.macs is None for row in made.coverage)
    assert not made.operations
    assert int8_share(made.coverage) is None


class Transposed(nn.Module):
    """A linear layer as GPT-2 has it, and a bias by position, which is no factor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.positions = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x.new_zeros(8), x.flatten(0, 1), self.weight).unflatten(0, x.shape[:2]) + self.positions


class Experts(nn.Module):
    """Weights of several linear layers in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0] + x @ self.weights[1]


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


@pytest.mark.parametrize("kind", ["weight_only", "dynamic"])
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_custom_modules_that_multiply_by_their_own_weight_are_reported_as_float(mode: str, kind: Any) -> None:
    network = nn.Sequential(Transposed(), Experts(), Added(), nn.Linear(8, 4)).eval()
    converted = quantize(network, Example((torch.randn(2, 5, 16),)), Recipe(mode, "x86", kind=kind))
    assert {row.name: row.quantized for row in converted.coverage} == {"0": False, "1": False, "3": True}
    assert all("multiplies by its own weight" in row.reason for row in converted.coverage if not row.quantized)
