"""Transposed convolutions in mode pt2e on x86: fake-quant in training, int8, files."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from qat_lightning import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.modes.test_fx_transposed import IMAGES, LAYERS, Decoder
from tests.support.exactness import SEVEN_BITS

RECIPE = Recipe("pt2e", "x86", SEVEN_BITS)


@pytest.fixture(autouse=True)
def decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


def trained(network: nn.Module, example: Example, recipe: Recipe = RECIPE) -> nn.Module:
    """Prepared and with ranges, and with a BatchNorm that is not the identity."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    prepared = get_mode("pt2e").prepare(network, example, recipe)
    calibrate(prepared, [example])
    return prepared


def converted_of(prepared: nn.Module, example: Example) -> Converted:
    return get_mode("pt2e").convert(cpu_copy(prepared), example)


def ops_of(converted: Converted) -> list[str]:
    network: Any = converted.network
    return [str(node.target) for node in network.decomposed.graph.nodes]


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.slow
def test_int8_is_fake_quant(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x = LAYERS[case]
    network, example = Decoder(make()), Example((x,))
    prepared = trained(copy.deepcopy(network), example)
    assert set(network.state_dict()) <= set(prepared.state_dict())
    prepared.train()(x).square().mean().backward()
    assert bool(prepared.get_parameter("up.weight").grad.any())  # type: ignore[union-attr]
    converted = converted_of(prepared, example)
    assert {row.name: row.quantized for row in converted.coverage} == {"up": True, "head": True}
    assert all(row.macs for row in converted.coverage)
    assert min(check.sqnr_db for check in converted.checks) >= 60
    assert {check.name for check in converted.checks} >= {"up", "head"}
    assert not [op for op in ops_of(converted) if "batch_norm" in op or "conv_transpose" in op]
    (norm,) = [row for row in converted.operations if row.name.startswith("norm")]
    assert norm.quantized
    quantized = QuantizedNetwork(converted, RECIPE, example)
    quantized.save(tmp_path / "network.int8")
    assert torch.equal(load_quantized(tmp_path / "network.int8")(x), quantized(x))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["3x3 with output padding, grouped", "1d"])
def test_it_is_compiled(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, x = LAYERS[case]
    example = Example((x,))
    converted = converted_of(trained(Decoder(make()), example), example)
    quantized = QuantizedNetwork(converted, RECIPE, example)
    expected = quantized(x)
    quantized.save(tmp_path / "network.int8")
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "1")
    loaded: Any = load_quantized(tmp_path / "network.int8")
    torch.testing.assert_close(loaded(x), expected, atol=float(expected.abs().max()) / 255, rtol=0)
    int8 = next(module for module in loaded.modules() if hasattr(module, "runs"))
    assert int8.runs == "aotinductor", int8.why_decomposed
    assert loaded(torch.cat([x, x])).shape[0] == 2 * len(x)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_batchnorm_folds_into_a_weight_that_is_computed(granularity: Any) -> None:
    torch.manual_seed(0)
    make, x = LAYERS["4x4"]
    network, example = Decoder(weight_norm(make(), dim=1)), Example((x,))
    recipe = replace(RECIPE, scheme=Scheme(weight_granularity=granularity))
    converted = converted_of(trained(network, example, recipe), example)
    assert not [op for op in ops_of(converted) if "batch_norm" in op or "conv_transpose" in op]
    assert {row.name: row.quantized for row in converted.coverage}["head"]
    assert min(check.sqnr_db for check in converted.checks) >= 60


def test_before_the_first_rounding_the_prepared_network_is_the_float_one() -> None:
    make, x = LAYERS["3x3 with output padding, grouped"]
    network, example = Decoder(make()).eval(), Example((x,))
    prepared = get_mode("pt2e").prepare(copy.deepcopy(network), example, RECIPE).eval()
    set_phase(prepared, fake_quant=False, observers=False, batchnorm_frozen=False)
    torch.testing.assert_close(prepared(x), network(x))


class Functional(nn.Module):
    """A weight of the network that two calls share, one of them without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8, 2, 2)), nn.Parameter(torch.randn(8))
        self.gate, self.last = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(x, self.weight, self.bias, 2)
        y = F.conv_transpose2d(y.relu(), self.weight, None, stride=2)
        z: Tensor = self.last(self.gate(y))
        return z


def test_functions_and_weights_that_are_used_twice() -> None:
    torch.manual_seed(0)
    example = Example((IMAGES,))
    converted = converted_of(trained(Functional(), example), example)
    assert not [op for op in ops_of(converted) if "conv_transpose" in op]
    assert min(check.sqnr_db for check in converted.checks) >= 60


class ByTheInput(nn.Module):
    """A kernel computed from the input, which is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.head = nn.Linear(8, 8 * 4), nn.Conv2d(1, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x.mean((0, 2, 3))).reshape(8, 1, 2, 2)
        y: Tensor = self.head(F.conv_transpose2d(x, kernel))
        return y


def test_a_kernel_that_depends_on_the_input_stays_float() -> None:
    example = Example((IMAGES,))
    converted = converted_of(trained(ByTheInput(), example), example)
    (row,) = [row for row in converted.operations if "conv_transpose" in row.kind]
    assert (row.quantized, len(row.reason) > 0) == (False, True)


def test_what_is_excluded_stays_one_layer() -> None:
    found = rehearse(Decoder(LAYERS["2x2"][0]()), Example((IMAGES,)), replace(RECIPE, exclude=("up",)))
    (row,) = [row for row in found.coverage if row.name == "up"]
    assert (row.quantized, row.reason) == (False, "excluded")


def test_a_checkpoint_of_an_earlier_release_has_no_ranges_for_them() -> None:
    earlier = replace(RECIPE, families=tuple(name for name in RECIPE.families if name != "subpixel"))
    found = rehearse(Decoder(LAYERS["2x2"][0]()), Example((IMAGES,)), earlier)
    (row,) = [row for row in found.coverage if row.name == "up"]
    assert not row.quantized
    assert "no rule for aten.conv_transpose2d" in row.reason
