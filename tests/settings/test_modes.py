"""The table of modes' traits matches their code."""

import pickle

import pytest
import torch
from torch import nn

from qat_lightning import Example, Recipe, calibrate, prepare
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConfigurationError, QuantizationError
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.backends import MODES
from qat_lightning.settings.modes import traits_of


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_does_what_its_row_says(mode: str) -> None:
    network, example = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), Example((torch.randn(8, 4),))
    recipe = Recipe(mode, "x86", kind="static")
    prepared = prepare(network, example, recipe)
    assert (prepared is network) is not traits_of(mode).captures
    calibrate(prepared, [example])
    int8 = QuantizedNetwork(get_mode(mode).convert(prepared.eval(), example), recipe, example, source="a test")
    try:
        pickle.dumps(int8)
    except QuantizationError:
        packs = True
    else:
        packs = False
    assert packs is traits_of(mode).packs


def test_an_unknown_mode_is_an_error_that_lists_them() -> None:
    with pytest.raises(ConfigurationError, match="eager, fx, pt2e, auto"):
        traits_of("jit")
