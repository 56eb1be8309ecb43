"""Weights of transposed convolutions, whose output channels are the second dimension."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning import Scheme, load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.layers.integer import integer_layer
from qat_lightning.layers.integer.weights import weight_of_rows, weight_rows
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.recipe import Recipe

LAYERS = {
    "1d": lambda: nn.ConvTranspose1d(6, 4, 3, stride=2),
    "2d": lambda: nn.ConvTranspose2d(6, 4, 3),
    "3d": lambda: nn.ConvTranspose3d(6, 4, 2),
    "groups": lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
    "depthwise": lambda: nn.ConvTranspose2d(6, 6, 3, groups=6),
    "square": lambda: nn.ConvTranspose2d(6, 6, 1),
}
MODES = ["eager", "fx", "pt2e"]


def uneven(name: str) -> nn.Module:
    """A layer with outputs of different sizes."""
    layer: nn.Module = LAYERS[name]()
    with torch.no_grad():
        for output in range(layer.out_channels):
            layer.weight[rows_of(layer, output)] *= 10.0 ** (output % 3)
    return layer


def rows_of(layer: nn.Module, output: int) -> tuple[slice, int]:
    """The part of the weight that belongs to an output channel."""
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    group = output // outputs
    return slice(group * inputs, (group + 1) * inputs), output % outputs


def rounded(layer: nn.Module, size: int = 0) -> np.ndarray:
    """In float64, with one scale per output channel, or one per ``size`` values of it."""
    weight = layer.weight.detach().double().numpy().copy()
    for output in range(layer.out_channels):
        part = weight[rows_of(layer, output)].reshape(-1)
        for start in range(0, part.size, size or part.size):
            group = part[start : start + (size or part.size)]
            scale = np.abs(group).max() / 127
            group[:] = np.round(group / scale) * scale
        weight[rows_of(layer, output)] = part.reshape(weight[rows_of(layer, output)].shape)
    return weight


def with_weight(layer: nn.Module, weight: np.ndarray) -> nn.Module:
    exact = copy.deepcopy(layer).double()
    exact.weight.data = torch.from_numpy(weight)
    return exact


def batch(layer: nn.Module) -> Tensor:
    return torch.randn(2, layer.in_channels, *[5] * (layer.weight.dim() - 2))


@pytest.fixture(autouse=True)
def _no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [0, 16])
def test_each_output_has_scales_of_its_own(name: str, mode: str, size: int, tmp_path: Path) -> None:
    layer = uneven(name)
    network, x = nn.Sequential(nn.Identity(), layer), batch(layer)
    granularity = {"weight_granularity": "per_group", "weight_group_size": size} if size else {}
    recipe = Recipe(mode, "x86", Scheme(**granularity), kind="weight_only")
    quantized = QuantizedNetwork(quantize(network, Example((x,)), recipe), recipe, Example((x,)))
    wanted = with_weight(layer, rounded(layer, size))(x.double())
    got = quantized(x)
    error = (got.double() - wanted).abs().transpose(0, 1).flatten(1).amax(1)
    assert (error <= 1e-5 * wanted.abs().transpose(0, 1).flatten(1).amax(1)).all()
    quantized.save(tmp_path / "net.int8")
    fresh = nn.Sequential(nn.Identity(), LAYERS[name]()) if mode == "eager" else None
    assert torch.equal(load_quantized(tmp_path / "net.int8", network=fresh)(x), got)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "scheme", [Scheme(weight_bits=4), Scheme(weight_symmetric=False), Scheme(weight_granularity="per_tensor")], ids=str
)
def test_other_grids_keep_the_order_of_the_weight(mode: str, scheme: Scheme) -> None:
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
    x = batch(layer)
    network = quantize(nn.Sequential(layer), Example((x,)), Recipe(mode, "x86", scheme, kind="weight_only")).network
    assert torch.allclose(network(x), layer(x), atol=0.15 if scheme.weight_bits == 4 else 0.02)


def test_layer_gives_the_weight_as_the_float_layer_has_it() -> None:
    layer = uneven("groups")
    made = integer_layer(layer, Recipe("eager", "x86", kind="weight_only"))
    assert np.allclose(made.weight.numpy(), rounded(layer), rtol=1e-6)
    assert made.groups == 2


@pytest.mark.slow
def test_compiled_network_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "1")
    layer = uneven("groups")
    x = batch(layer)
    network = quantize(nn.Sequential(layer), Example((x,)), Recipe("pt2e", "x86", kind="weight_only")).network
    wanted = with_weight(layer, rounded(layer))(x.double())
    assert (network(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert network.runs == "aotinductor", network.why_decomposed


@given(groups=st.integers(1, 3), inputs=st.integers(1, 4), outputs=st.integers(1, 4), kernel=st.integers(1, 3))
def test_rows_are_outputs_and_go_back(groups: int, inputs: int, outputs: int, kernel: int) -> None:
    layer = nn.ConvTranspose1d(groups * inputs, groups * outputs, kernel, groups=groups)
    rows = weight_rows(layer.weight, groups)
    assert rows.shape == (groups * outputs, inputs * kernel)
    for output in range(groups * outputs):
        assert torch.equal(rows[output], layer.weight[rows_of(layer, output)].reshape(-1))
    assert torch.equal(weight_of_rows(rows, layer.weight.shape, groups), layer.weight)
