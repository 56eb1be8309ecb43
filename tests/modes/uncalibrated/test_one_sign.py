"""Compiled dynamic layers on inputs of either sign, compared with the documented arithmetic in float64."""

from __future__ import annotations

import operator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat_lightning import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.checks import LayerCheck
from qat_lightning.export.protocol import Source
from qat_lightning.export.pt2 import AotInductor
from qat_lightning.graph.example import Example
from qat_lightning.modes.decomposed import compiling
from qat_lightning.modes.decomposed.int8 import Int8Network
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.backends import BACKENDS
from qat_lightning.settings.recipe import Recipe
from tests.support.exactness import needs_onednn


def in_float64(layer: nn.Linear, x: Tensor) -> np.ndarray:
    """Weights on -127..127 with one scale per output; inputs on 0..255 of their own range, which includes 0."""
    weight, values = (np.asarray(t.detach().numpy(), np.float64) for t in (layer.weight, x))
    scales = np.maximum(np.abs(weight).max(1, keepdims=True) / 127, 2.0**-23)
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    scale = max((high - low) / 255, 2.0**-23)
    zero_point = np.clip(-np.round(low / scale), 0, 255)
    integers = np.clip(np.round(values / scale) + zero_point, 0, 255)
    product = (integers - zero_point) * scale @ (np.round(weight / scales) * scales).T
    bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
    return np.asarray(product + bias)


def is_within_a_step(got: Tensor, layer: nn.Linear, x: Tensor) -> bool:
    """A tie between two integers may round either way in float32: one step of one input is allowed."""
    wanted = in_float64(layer, x)
    x = x.detach()
    step = (max(float(x.max()), 0.0) - min(float(x.min()), 0.0)) / 255
    return bool(np.abs(got.numpy() - wanted).max() <= 1.01 * step * float(layer.weight.detach().abs().max()) + 1e-5)


INPUTS = {
    "mixed": torch.randn(8, 16),
    "positive": torch.rand(8, 16) + 1,
    "negative": -torch.rand(8, 16) - 1,
    "far from 0": torch.rand(8, 16) + 100,
    "constant": torch.full((8, 16), 2.5),
    "negative constant": torch.full((8, 16), -2.5),
    "zeros": torch.zeros(8, 16),
    "tiny": torch.rand(8, 16) * 1e-9,
    "one row": torch.rand(1, 16) + 1,
}


def quantized(layer: nn.Module, first: Tensor, mode: str = "pt2e") -> QuantizedNetwork:
    recipe, example = Recipe(mode, "x86", kind="dynamic"), Example((first,))
    return QuantizedNetwork(quantize(layer, example, recipe), recipe, example)


def runs_compiled(network: QuantizedNetwork) -> bool:
    assert isinstance(network.network, Int8Network)
    return network.network.runs == "aotinductor"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["mixed", "positive", "negative"])
@needs_onednn
def test_every_input_is_right_whatever_the_first_was(first: str, tmp_path: Path) -> None:
    layer = nn.Linear(16, 4)
    network = quantized(layer, INPUTS[first])
    network.save(tmp_path / "net.int8")
    for one in (network, load_quantized(tmp_path / "net.int8")):
        one(INPUTS[first])
        assert runs_compiled(one), one.network.why_decomposed
        for name, x in INPUTS.items():
            assert is_within_a_step(one(x), layer, x), name


@pytest.mark.slow
@needs_onednn
def test_nan_stays_nan() -> None:
    network = quantized(nn.Linear(16, 4), INPUTS["mixed"])
    network(INPUTS["mixed"])
    assert runs_compiled(network), network.network.why_decomposed
    assert network(INPUTS["mixed"].where(torch.arange(16) != 3, torch.nan)).isnan().all()


class Pooled(nn.Module):
    """The end of most convolutional networks, whose linear layer never gets a negative number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def pooled(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pooled(x))


@pytest.mark.slow
@needs_onednn
def test_layer_behind_a_pooled_relu_is_compiled_and_right() -> None:
    pooled = Pooled().eval()
    first, second = torch.randn(8, 3, 16, 16), torch.randn(5, 3, 16, 16)
    network = quantized(pooled, first)
    network(first)
    assert runs_compiled(network), network.network.why_decomposed
    for x in (first, second):
        assert is_within_a_step(network(x), pooled.head, pooled.pooled(x))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@needs_onednn
def test_exported_package_is_right(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    layer = nn.Linear(16, 4)
    network = quantized(nn.Sequential(layer), INPUTS["mixed"], mode)
    AotInductor().write(Source(network, Example((INPUTS["mixed"],))), tmp_path / "net.pt2")
    run = AotInductor().load(tmp_path / "net.pt2")
    for name, x in INPUTS.items():
        assert is_within_a_step(run([x])[0], layer, x), name


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(("low", "high", "dtype"), [(0, 255, torch.uint8), (-128, 127, torch.int8)])
def test_grids_are_written_out_as_the_op_has_them(name: str, low: int, high: int, dtype: torch.dtype) -> None:
    graph = fx.Graph()
    arguments = (graph.placeholder("x"), low, high, 2.0**-23, dtype)
    op = torch.ops.quantized_decomposed.choose_qparams.tensor
    chosen = graph.call_function(op, arguments)
    graph.output(tuple(graph.call_function(operator.getitem, (chosen, part)) for part in (0, 1)))
    compiling._choose_grids_that_hold_zero(graph)
    assert not graph.find_nodes(op="call_function", target=op)
    scale, zero_point = fx.GraphModule(nn.Module(), graph)(INPUTS[name])
    wanted = op(INPUTS[name], *arguments[1:])
    assert (scale.item(), zero_point.item()) == (wanted[0].item(), wanted[1].item())
    assert (scale.dtype, zero_point.dtype) == (wanted[0].dtype, wanted[1].dtype)


@pytest.mark.parametrize(("steps", "ends"), [(torch.nan, "on the same inputs"), (7.0, "up to 7 steps apart")])
def test_what_is_said_of_a_wrong_layer(steps: float, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = quantized(nn.Linear(16, 4), INPUTS["mixed"]).network
    monkeypatch.setattr(compiling, "check_kernels", lambda *args: [LayerCheck("head", "aten.linear", 9.0, steps)])
    wrong = lambda x: [torch.zeros(8, 4)]  # noqa: E731
    said = compiling.difference(network.decomposed, wrong, network.spec, [INPUTS["mixed"]], BACKENDS["x86"])
    assert said.startswith("the compiled layer 'head'")
    assert said.endswith(ends)
