"""Tensors other than inputs that a graph reads: constants with several readers, and tensors that are not quantized."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.artifact import artifact_bytes, quantized_from_bytes
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe

pytestmark = pytest.mark.usefixtures("without_compiler")


class ConstantsReadTwice(nn.Module):
    """A buffer under two names, one of them like an op, a parameter and its view, and a constant created in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.register_buffer("also_mean", self.mean)
        self.gain = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
        y = self.b(F.relu(self.a((x - self.mean) * made))) + self.also_mean
        return (y * self.gain.view(1, 3, 1, 1) + self.gain[:, None, None] + made) * made + self.mean


class WeightReadTwice(nn.Module):
    """A decoder with the weight of its encoder, and a layer called twice whose bias is also read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.again = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(F.relu(self.again(self.encode(x)))) + self.again.bias
        return F.linear(y, self.encode.weight.t())


class IntegersAndMasks(nn.Module):
    """Integers, masks, float64 and a spectrum as inputs of ops that quantizers support."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        count = (x[:, :2] > 0).long()
        count = torch.cat([count * torch.ones_like(count) + count, count], 1).max(1, keepdim=True).values
        mask = (x > -1) & (x < 1)
        y = self.a(x) * mask + torch.where(count > 1, count, -count).float()
        spectrum = torch.fft.rfft(y)
        spectrum = torch.cat([spectrum[:2] * spectrum[:2], spectrum[2:] + spectrum[2:]])
        wide = y.double()
        wide = torch.cat([wide * wide, wide + wide], 1)[:, :8]
        return (
            self.b(F.normalize(torch.fft.irfft(spectrum, n=8)) + wide.float()[:, [1, 0, 2, 3, 4, 5, 6, 7]]),
            count,
            mask,
        )


def trained_and_converted(network: nn.Module, x: Tensor, backend: str) -> tuple[nn.Module, Converted, Recipe]:
    recipe, example = Recipe("pt2e", backend), Example((x,))
    prepared = get_mode("pt2e").prepare(network, example, recipe)
    prepared.train()(x)
    fake_quant = cpu_copy(prepared)
    return fake_quant, get_mode("pt2e").convert(copy.deepcopy(fake_quant), example), recipe


@pytest.mark.parametrize("backend", ["x86", "xnnpack"])
@pytest.mark.parametrize(
    ("make", "shape"), [(ConstantsReadTwice, (4, 3, 6, 6)), (WeightReadTwice, (4, 16)), (IntegersAndMasks, (4, 8))]
)
@pytest.mark.slow
def test_int8_equals_fake_quant_and_is_saved(make: type[nn.Module], shape: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    fake_quant, converted, recipe = trained_and_converted(make(), x, backend)
    loaded = quantized_from_bytes(artifact_bytes(QuantizedNetwork(converted, recipe, Example((x,)))))
    results = [network(x) for network in (fake_quant, converted.network, loaded)]
    for wanted, *others in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        for other in others:
            torch.testing.assert_close(other, wanted)


class Standardized(nn.Conv2d):
    """A convolution whose weight is computed from its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


def test_a_layer_with_a_computed_weight_is_reported_as_what_it_is() -> None:
    _, converted, _ = trained_and_converted(nn.Sequential(Standardized(3, 4, 3)), torch.randn(2, 3, 6, 6), "x86")
    assert [(row.name, row.quantized) for row in converted.coverage] == [("0", True)]


def test_nothing_but_float32_is_rounded() -> None:
    seen: list[torch.dtype] = []
    x = torch.randn(4, 8)
    prepared = get_mode("pt2e").prepare(IntegersAndMasks(), Example((x,)), Recipe("pt2e", "xnnpack"))
    for module in prepared.modules():
        if isinstance(module, FakeQuantize):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    prepared(x)
    assert set(seen) == {torch.float32}
    rows = get_mode("pt2e").coverage(cpu_copy(prepared), Example((x,)))
    assert {row.name: row.quantized for row in rows if row.what == "layer"} == {"a": True, "b": True}
    assert any("float64" in row.reason for row in rows)
