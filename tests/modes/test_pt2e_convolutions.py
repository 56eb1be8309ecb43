"""Convolutions that mode pt2e once left float: of sequences without a ReLU, and with padding by name."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.pt2e.capture import capture
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe
from tests.support.exactness import SEVEN_BITS
from tests.support.nightly import nightly_except


class Gated(nn.Module):
    """A block of WaveNet: dilated, causal, gated, residual."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.behind = dilation
        self.filter, self.gate = (nn.Conv1d(channels, channels, 2, dilation=dilation) for _ in range(2))
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (self.behind, 0))
        y: Tensor = x + self.out(self.filter(padded).tanh() * self.gate(padded).sigmoid())
        return y


class SmallWaveNet(nn.Sequential):
    def __init__(self) -> None:
        blocks = (Gated(8, dilation) for dilation in (1, 2))
        super().__init__(
            nn.Conv1d(1, 8, 3, padding="same"), *blocks, nn.Conv1d(8, 16, 1), nn.ReLU(), nn.Conv1d(16, 4, 1)
        )


def padded_by_name() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(4, 4, (5, 3), padding="same", dilation=2),
        nn.Conv2d(4, 4, (4, 2), padding="same", dilation=(1, 3)),
        nn.Conv2d(4, 4, 3, padding="valid", stride=2),
    )


@pytest.mark.parametrize("backend", ["x86", "xnnpack"])
@pytest.mark.parametrize(
    ("make", "shape"), [(SmallWaveNet, (4, 1, 24)), (padded_by_name, (4, 3, 12, 12))], ids=["WaveNet", "padded by name"]
)
def test_all_of_it_is_int8(make: type[nn.Module], shape: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    network, example, recipe = make(), Example((torch.randn(shape),)), Recipe("pt2e", backend)
    prepared = get_mode("pt2e").prepare(copy.deepcopy(network), example, recipe)
    calibrate(prepared, [example])
    converted = get_mode("pt2e").convert(prepared, example)
    assert all(row.quantized for row in converted.coverage)
    assert min(check.sqnr_db for check in converted.checks) >= 60
    assert converted.whole is not None


@pytest.mark.slow
@pytest.mark.parametrize("make", nightly_except([SmallWaveNet, padded_by_name], padded_by_name))
def test_it_is_compiled(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "1")
    shape = (4, 1, 24) if make is SmallWaveNet else (4, 3, 12, 12)
    example = Example((torch.randn(shape),))
    prepared = get_mode("pt2e").prepare(make(), example, Recipe("pt2e", "x86", SEVEN_BITS))
    calibrate(prepared, [example])
    int8 = get_mode("pt2e").convert(prepared, example).network
    int8(*example.args)
    assert int8.runs == "aotinductor", int8.why_decomposed


def test_padding_by_name_is_the_same_with_numbers() -> None:
    network, x = padded_by_name().eval(), torch.randn(4, 3, 12, 12)
    graph_module, _ = capture(network, Example((x,)))
    assert not [node for node in graph_module.graph.nodes if str(node.target).endswith(".padding")]
    torch.testing.assert_close(graph_module(x)[0], network(x))


def test_a_checkpoint_of_an_earlier_release_has_no_ranges_for_them() -> None:
    recipe = Recipe("pt2e", "x86")
    earlier = replace(recipe, families=tuple(name for name in recipe.families if name != "convolutions"))
    found = rehearse(SmallWaveNet(), Example((torch.randn(4, 1, 24),)), earlier)
    quantized = [row.name for row in found.coverage if row.quantized and row.what == "layer"]
    assert quantized == ["3"], "the one with a ReLU behind it"
