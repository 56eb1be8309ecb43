"""Transposed convolutions in mode fx: fake-quant in training, int8 on every backend, files, names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.engines import packing_engine
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import Lit, qat, trainer
from tests.callbacks.lit import loader as batches
from tests.support.exactness import X86_LEAST_DB

# The same whatever was imported before: a single step of an output this small is 58 dB.
_GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(4, 8, 6, 6, generator=_GENERATOR)
SEQUENCES = torch.randn(4, 8, 12, generator=_GENERATOR)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "2x2": (lambda: nn.ConvTranspose2d(8, 6, 2, 2), IMAGES),
    "4x4": (lambda: nn.ConvTranspose2d(8, 6, 4, 2, 1), IMAGES),
    "3x3 with output padding, grouped": (lambda: nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=4, bias=False), IMAGES),
    "dilated, without stride": (lambda: nn.ConvTranspose2d(8, 6, 3, 1, 2, dilation=2), IMAGES),
    "uneven": (lambda: nn.ConvTranspose2d(8, 6, (3, 5), (2, 3), (1, 0)), IMAGES),
    "below the stride": (lambda: nn.ConvTranspose2d(8, 6, 2, 3, output_padding=1), IMAGES),
    "1d": (lambda: nn.ConvTranspose1d(8, 6, 5, 3, 1, 2), SEQUENCES),
}


class Decoder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.up, wide = layer, isinstance(layer, nn.ConvTranspose2d)
        self.norm = (nn.BatchNorm2d if wide else nn.BatchNorm1d)(layer.out_channels)  # type: ignore[arg-type]
        self.head = (nn.Conv2d if wide else nn.Conv1d)(layer.out_channels, 4, 1)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.up(x)).relu())
        return y


@pytest.mark.parametrize("backend", ["x86", "onednn", "fbgemm", "qnnpack"])
@pytest.mark.parametrize("case", LAYERS)
def test_int8_is_fake_quant(case: str, backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x = LAYERS[case]
    network, example, recipe = Decoder(make()), Example((x,)), Recipe("fx", backend)
    prepared = get_mode("fx").prepare(copy.deepcopy(network), example, recipe)
    assert set(network.state_dict()) <= set(prepared.state_dict())
    calibrate(prepared, [example])
    prepared.train()(x).square().mean().backward()
    assert bool(prepared.get_parameter("up.weight").grad.any())  # type: ignore[union-attr]
    converted = get_mode("fx").convert(cpu_copy(prepared), example)
    enough = X86_LEAST_DB if backend in ("x86", "onednn") else 50
    assert min(check.sqnr_db for check in converted.checks) >= enough
    assert {row.name: row.quantized for row in converted.coverage} == {"up": True, "head": True}
    # Its kernel is for images only.
    assert {row.name: row.quantized for row in converted.operations}["norm"] is (x.ndim == 4)
    quantized = QuantizedNetwork(converted, recipe, example)
    quantized.save(tmp_path / "network.int8")
    with packing_engine(recipe.target.engine):
        assert torch.equal(load_quantized(tmp_path / "network.int8")(x), quantized(x))


def test_what_is_excluded_stays_one_layer() -> None:
    network = Decoder(nn.ConvTranspose2d(8, 6, 2, 2))
    found = rehearse(network, Example((IMAGES,)), Recipe("fx", "x86", exclude=("up",)))
    (row,) = [row for row in found.coverage if row.name == "up"]
    assert (row.quantized, row.reason) == (False, "excluded")


def test_a_checkpoint_of_an_earlier_release_has_no_ranges_for_them() -> None:
    network, recipe = Decoder(nn.ConvTranspose2d(8, 6, 2, 2)), Recipe("fx", "x86")
    earlier = replace(recipe, families=tuple(name for name in recipe.families if name != "transposed"))
    prepared = get_mode("fx").prepare(network, Example((IMAGES,)), earlier)
    (row,) = [row for row in get_mode("fx").coverage(prepared, Example((IMAGES,))) if row.name == "up"]
    assert (row.quantized, row.reason) == (False, "ConvTranspose2d is not quantized in mode='fx'")


class SmallUNet(nn.Module):
    """Downsampling, upsampling by a transposed convolution, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.down, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.last = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        y: Tensor = self.last(torch.cat([first, self.up(self.second(self.down(first)))], 1))
        return y


def test_a_u_net_trains_and_is_all_int8() -> None:
    torch.manual_seed(0)
    network = SmallUNet()
    network(next(iter(batches()))[0])
    callback = qat("fx")
    trainer(callback).fit(Lit(network), batches())
    quantized = callback.quantized
    assert quantized is not None
    assert all(row.quantized for row in quantized.coverage)
    assert quantized.whole is not None
