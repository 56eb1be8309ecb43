"""Correct int8 networks cause no errors, whatever their structure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.recipe import Recipe
from tests.modes.verification.drawn import Drawn, DrawnNetwork, networks

PAIRS = [("fx", "x86"), ("fx", "fbgemm"), ("fx", "qnnpack"), ("eager", "x86"), ("eager", "qnnpack"), ("pt2e", "x86")]


def convert(network: nn.Module, example: Example, mode: str, backend: str = "x86") -> Converted:
    flow = get_mode(mode)
    prepared = flow.prepare(network, example, Recipe(mode, backend))
    for _ in range(2):
        prepared.train()(*example.args)
    return flow.convert(cpu_copy(prepared), example)


def check(drawn: Drawn, pair: tuple[str, str]) -> None:
    torch.manual_seed(drawn.seed)
    mode, backend = pair
    batch = drawn.batch if mode != "pt2e" else max(2, drawn.batch)
    images = torch.randn(batch, 3, 4, 4) * drawn.gain
    converted = convert(DrawnNetwork(drawn), Example((images,)), mode, backend)
    assert converted.whole is not None


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=networks(), pair=st.sampled_from(PAIRS[:-1]))
def test_no_alarm(drawn: Drawn, pair: tuple[str, str]) -> None:
    check(drawn, pair)


@pytest.mark.nightly
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=networks(), pair=st.sampled_from(PAIRS))
def test_no_alarm_in_two_hundred_networks(drawn: Drawn, pair: tuple[str, str]) -> None:
    check(drawn, pair)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["fx", "eager", "pt2e"])
def test_an_addition_behind_dropout_and_permute_is_known_again(mode: str, p: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = nn.Conv1d(8, 16, 3, padding=1), nn.Dropout(p)
            self.out = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.drop(self.conv(x)).permute(2, 0, 1) + x.mean(1, keepdim=True).permute(2, 0, 1)
            return self.out(hidden + self.drop(hidden).transpose(0, 0))

    torch.manual_seed(0)
    converted = convert(Net(), Example((torch.randn(2, 8, 32),)), mode)
    assert min(check.sqnr_db for check in converted.checks) > 45


def test_small_values_on_a_coarse_grid_are_no_alarm() -> None:
    """One outlier determines the grid; after GELU almost all values are a few steps at most."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(nn.functional.gelu(self.norm(nn.functional.gelu(self.first(x)))) - 0.01)

    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16) * 0.005
    images[0, 0, 0, 0] = 5.0
    converted = convert(Net(), Example((images,)), "fx")
    assert all(check.sqnr_db > 100 for check in converted.checks if check.op in ("gelu", "sub"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "fx"])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_a_stack_of_recurrent_layers_is_judged_by_what_disturbing_does(cell: type[nn.RNNBase], mode: str) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = cell(8, 16, num_layers=3, batch_first=True)
            self.b = cell(16, 16, num_layers=3, batch_first=True)
            for parameter in self.parameters():
                parameter.data *= 6

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[0])[0]

    for seed in range(3):
        torch.manual_seed(seed)
        converted = quantize(Stack(), Example((torch.randn(2, 60, 8),)), Recipe(mode, "x86", kind="dynamic"))
        assert converted.whole is not None
