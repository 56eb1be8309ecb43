"""Networks prepared as in PyTorch's own tutorials: what is accepted, and what raises an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.qat as nnqat
import torch.ao.quantization as upstream
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
EXAMPLE = Example((torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))
LAYERS = [["conv", "bn", "relu"]]


class Tutorial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.functional = upstream.QuantStub(), upstream.DeQuantStub(), FloatFunctional()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.second, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        x = self.functional.add_relu(x, self.second(x))
        return self.dequant(self.head(x.mean((2, 3))))


def fused() -> Any:
    return upstream.fuse_modules(Tutorial().eval(), LAYERS).train()


def fused_for_training() -> Any:
    return upstream.fuse_modules_qat(Tutorial().train(), LAYERS)


def with_settings() -> Any:
    network: Any = Tutorial()
    network.qconfig, network.head.qconfig = upstream.get_default_qat_qconfig("x86"), None
    return network


def prepared_for_training() -> Any:
    network = fused_for_training()
    network.qconfig = upstream.get_default_qat_qconfig("x86")
    return upstream.prepare_qat(network)


def prepared() -> Any:
    network = fused().eval()
    network.qconfig = upstream.get_default_qconfig("x86")
    return upstream.prepare(network)


def converted() -> Any:
    network = prepared()
    network(*EXAMPLE.args)
    return upstream.convert(network)


def with_a_layer() -> Any:
    network = Tutorial()
    network.second = nnqat.Conv2d(8, 8, 1, qconfig=upstream.get_default_qat_qconfig("x86"))
    return network


@pytest.mark.parametrize("make", [Tutorial, fused, fused_for_training, with_settings])
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_what_is_float_may_stay(mode: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    torch.manual_seed(0)
    network = make()
    keys = set(network.state_dict())
    trained = get_mode(mode).prepare(network, EXAMPLE, Recipe(mode, "x86")).train()
    assert keys <= set(trained.state_dict())
    for _ in range(3):
        trained(*EXAMPLE.args)
    int8 = get_mode(mode).convert(cpu_copy(trained), EXAMPLE)
    assert all(row.quantized for row in int8.coverage)
    with torch.no_grad():
        assert sqnr_db(cpu_copy(trained)(*EXAMPLE.args), int8.network(*EXAMPLE.args)) > 60


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (prepared_for_training, "FusedMovingAvgObsFakeQuantize"),
        (prepared, "HistogramObserver"),
        (converted, "'quant' .Quantize"),
        (with_a_layer, "'second' .Conv2d"),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_what_is_quantized_is_refused_by_name(mode: str, make: Callable[[], Any], named: str) -> None:
    words = rf"{named}.*a float network is expected.*before prepare"
    with pytest.raises(NetworkError, match=words):
        get_mode(mode).prepare(make(), EXAMPLE, Recipe(mode, "x86"))
    with pytest.raises(NetworkError, match=words):
        quantize(make(), EXAMPLE, Recipe(mode, "x86", kind="dynamic"))


@pytest.mark.parametrize("first", ["eager", "fx"])
@pytest.mark.parametrize("second", ["eager", "fx", "pt2e", "parts"])
def test_a_network_that_is_prepared_already_is_refused_in_every_mode(first: str, second: str) -> None:
    prepared = get_mode(first).prepare(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), EXAMPLE, Recipe(first, "x86"))
    with pytest.raises(NetworkError, match=r"prepared for quantization already, .* a copy of the float network"):
        get_mode(second).prepare(nn.Sequential(prepared), EXAMPLE, Recipe(second, "x86"))
