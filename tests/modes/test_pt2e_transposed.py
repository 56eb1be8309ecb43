"""Transposed convolutions in mode pt2e on x86: fake-quant in training, int8, in files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from qat_lightning import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe
from tests.modes.test_fx_transposed import LAYERS, Decoder


@pytest.mark.parametrize("case", ["3x3 with output padding, grouped", "uneven", "1d"])
def test_int8_is_fake_quant(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x = LAYERS[case]
    network, example, recipe = Decoder(make()), Example((x,)), Recipe("pt2e", "x86")
    prepared = get_mode("pt2e").prepare(copy.deepcopy(network), example, recipe)
    assert set(network.state_dict()) <= set(prepared.state_dict())
    calibrate(prepared, [example])
    prepared.train()(x).square().mean().backward()
    assert bool(prepared.get_parameter("up.weight").grad.any())  # type: ignore[union-attr]
    converted = get_mode("pt2e").convert(cpu_copy(prepared), example)
    assert {row.name: row.quantized for row in converted.coverage} == {"up": True, "head": True}
    assert min(check.sqnr_db for check in converted.checks) >= 60
    quantized = QuantizedNetwork(converted, recipe, example)
    quantized.save(tmp_path / "network.int8")
    assert torch.equal(load_quantized(tmp_path / "network.int8")(x), quantized(x))


def test_what_is_excluded_stays_one_layer() -> None:
    network, example = Decoder(LAYERS["2x2"][0]()), Example((LAYERS["2x2"][1],))
    prepared = get_mode("pt2e").prepare(network, example, Recipe("pt2e", "x86", exclude=("up",)))
    (row,) = [row for row in get_mode("pt2e").coverage(prepared, example) if row.name == "up"]
    assert (row.quantized, row.reason) == (False, "excluded")
