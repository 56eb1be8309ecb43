"""Transposed convolutions in mode eager: fake-quant in training, int8 on every backend, files, names."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import NetworkError
from qat_lightning.export.program import int8_program
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.backends import BACKENDS
from qat_lightning.settings.engines import engine_here, packing_engine
from qat_lightning.settings.recipe import Recipe
from tests.modes.test_fx_transposed import IMAGES, LAYERS, Decoder
from tests.support.exactness import X86_LEAST_DB

RECIPE = Recipe("eager", "x86")


def trained(network: nn.Module, example: Example, recipe: Recipe = RECIPE) -> nn.Module:
    """Prepared and with ranges, and with a BatchNorm that is not the identity."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    prepared = get_mode("eager").prepare(network, example, recipe)
    calibrate(prepared, [example])
    return prepared


def converted_of(prepared: nn.Module, example: Example) -> Converted:
    return get_mode("eager").convert(cpu_copy(prepared), example)


def reasons_of(network: nn.Module, example: Example, recipe: Recipe = RECIPE) -> dict[str, str]:
    return {row.name: row.reason for row in rehearse(network, example, recipe).coverage if row.what == "layer"}


@pytest.mark.parametrize("backend", ["x86", "onednn", "fbgemm", "qnnpack"])
@pytest.mark.parametrize("case", LAYERS)
def test_int8_is_fake_quant(case: str, backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x = LAYERS[case]
    network, example, recipe = Decoder(make()), Example((x,)), Recipe("eager", backend)
    prepared = trained(copy.deepcopy(network), example, recipe)
    assert {name: value.shape for name, value in network.state_dict().items()}.items() <= {
        name: value.shape for name, value in prepared.state_dict().items()
    }.items()
    prepared.train()(x).square().mean().backward()
    assert bool(prepared.get_parameter("up.weight").grad.any())  # type: ignore[union-attr]
    converted = converted_of(prepared, example)
    enough = X86_LEAST_DB if backend in ("x86", "onednn") else 50
    assert min(check.sqnr_db for check in converted.checks) >= enough
    assert {row.name: row.quantized for row in converted.coverage} == {"up": True, "head": True}
    assert all(row.macs for row in converted.coverage)
    (chain,) = [chain for chain in converted.network.quantization_plan["chains"] if chain["name"] == "up"]
    assert chain["batchnorm"] == "norm", "it is folded"
    quantized = QuantizedNetwork(converted, recipe, example)
    quantized.save(tmp_path / "network.int8")
    with packing_engine(recipe.target.engine):
        assert torch.equal(load_quantized(tmp_path / "network.int8", network=network)(x), quantized(x))


@pytest.mark.parametrize("case", LAYERS)
def test_without_rounding_it_is_the_float_network(case: str) -> None:
    torch.manual_seed(0)
    make, x = LAYERS[case]
    network = Decoder(make())
    trained(network, Example((x,)))
    plain = Decoder(make())
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if name in plain.state_dict()})
    set_phase(network, fake_quant=False, observers=False, batchnorm_frozen=False)
    for training in (False, True):
        torch.testing.assert_close(network.train(training)(x), plain.train(training)(x))


def test_a_program_for_other_runtimes_computes_the_same() -> None:
    torch.manual_seed(0)
    make, x = LAYERS["uneven"]
    example = Example((x,))
    quantized = QuantizedNetwork(converted_of(trained(Decoder(make()), example), example), RECIPE, example)
    expected = quantized(x)
    got = int8_program(quantized).module()(x)
    got = got[0] if isinstance(got, tuple | list) else got
    torch.testing.assert_close(got, expected, rtol=0, atol=float(expected.abs().max()) / 100)


def test_a_checkpoint_of_the_float_network_loads() -> None:
    make, x = LAYERS["2x2"]
    network, other = Decoder(make()), Decoder(make())
    prepared = trained(network, Example((x,)))
    loaded = prepared.load_state_dict(other.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert not set(loaded.missing_keys) & set(other.state_dict())
    assert torch.equal(prepared.get_parameter("up.weight"), other.up.weight)  # type: ignore[arg-type]


class OfOneSample(nn.Module):
    """Called twice, and then without a batch, after a max-pooling that keeps the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.pool = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2), nn.MaxPool2d(2)
        self.last = nn.ConvTranspose2d(8, 3, 3, 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.pool(self.up(self.pool(self.first(x)))))
        z: Tensor = self.last(y[0])
        return z


def test_several_calls_and_one_sample() -> None:
    torch.manual_seed(0)
    example = Example((IMAGES,))
    converted = converted_of(trained(OfOneSample(), example), example)
    assert all(row.quantized for row in converted.coverage)
    assert min(check.sqnr_db for check in converted.checks) >= X86_LEAST_DB
    assert converted.whole is not None


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_three_dimensions(backend: str) -> None:
    torch.manual_seed(0)
    example = Example((torch.randn(2, 4, 3, 4, 5),))
    layers = (nn.ConvTranspose3d(4, 6, 3, 2, 1, 1), nn.BatchNorm3d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    network = nn.Sequential(*layers)
    network(*example.args)
    converted = converted_of(trained(network, example, Recipe("eager", backend)), example)
    up, head = converted.coverage
    assert head.quantized
    assert up.quantized == (engine_here(BACKENDS[backend].engine) != "qnnpack")
    assert up.quantized or "QNNPACK cannot save the weight of a ConvTranspose3d" in up.reason


class Sized(Decoder):
    """Is given its output size."""

    size: Any = (13, 13)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x) if self.size is None else self.up(x, output_size=self.size)
        y: Tensor = self.head(self.norm(up).relu())
        return y


def test_a_size_is_left_float_in_words_and_refused_where_it_is_new() -> None:
    network, example = Sized(nn.ConvTranspose2d(8, 6, 2, 2)), Example((IMAGES,))
    reasons = reasons_of(copy.deepcopy(network), example)
    assert "it is called with output_size=" in reasons["up"]
    assert not reasons["head"]
    network.size = None
    prepared: Any = trained(network, example)
    prepared.size = (13, 13)
    with pytest.raises(NetworkError, match="output_size="):
        prepared(IMAGES)


def test_left_float_it_takes_a_size() -> None:
    network, example = Sized(nn.ConvTranspose2d(8, 6, 2, 2)), Example((IMAGES,))
    network.size = None
    prepared: Any = trained(network, example)
    get_mode("eager").leave_float(prepared, ["up"], example)
    prepared.size = (13, 13)
    assert prepared(IMAGES).shape[2:] == (13, 13)


def test_what_is_excluded_stays_one_layer() -> None:
    reasons = reasons_of(Decoder(LAYERS["2x2"][0]()), Example((IMAGES,)), replace(RECIPE, exclude=("up",)))
    assert reasons == {"up": "excluded", "head": ""}


def test_a_checkpoint_of_an_earlier_release_has_no_ranges_for_them() -> None:
    earlier = replace(RECIPE, families=tuple(name for name in RECIPE.families if name != "subpixel"))
    reasons = reasons_of(Decoder(LAYERS["2x2"][0]()), Example((IMAGES,)), earlier)
    assert reasons == {"up": "ConvTranspose2d is not quantized in mode='eager'", "head": ""}
