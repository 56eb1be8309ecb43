"""An evaluation runs another variant, and the network is restored afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qat_lightning.callbacks.parts.float_weights import FloatWeights
from qat_lightning.callbacks.parts.int8_networks import Int8Networks
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.callbacks.parts.variant_source import TrainedVariants
from qat_lightning.callbacks.parts.variant_switch import VariantSwitch
from qat_lightning.errors import ConfigurationError
from tests.callbacks.lit import assert_same_state, state, trainer
from tests.callbacks.parts.placed import IMAGES, placed


def switch_of(networks: Networks) -> tuple[VariantSwitch, FloatWeights]:
    floats = FloatWeights(networks)
    source = TrainedVariants(networks, floats)
    return VariantSwitch(networks, Int8Networks(networks, source), source), floats


@torch.no_grad()
@pytest.mark.parametrize("variant", ["float", "fake_quant", "int8"])
def test_the_chosen_variant_stands_in_and_leaves_nothing(variant: str) -> None:
    lit, networks = placed()
    switch, floats = switch_of(networks)
    floats.keep(step=3)
    prepared, before, phase = lit.net, state(lit), networks.phase
    switch.choose(variant)
    expected = switch.network(variant)(IMAGES)
    switch.stand_in("test", trainer(), lit)
    assert torch.equal(lit(IMAGES), expected)
    assert lit.net.temperature == 2.0
    switch.stand_back()
    assert lit.net is prepared
    assert networks.phase == phase
    assert_same_state(state(lit), before)


@torch.no_grad()
def test_a_test_of_int8_says_how_close_it_is() -> None:
    lit, networks = placed()
    switch, _ = switch_of(networks)
    with_trainer = trainer()
    switch.stand_in("test", with_trainer, lit)
    lit(IMAGES)
    switch.end_test(with_trainer)
    assert switch.fidelity["agreement"] > 0.95


@torch.no_grad()
def test_a_guest_runs_in_place_of_any_variant() -> None:
    lit, networks = placed()
    switch, _ = switch_of(networks)
    with switch.running(nn.Flatten()):
        switch.stand_in("predict", trainer(), lit)
        assert torch.equal(lit(IMAGES), IMAGES.flatten(1))
        switch.stand_back()
    assert lit(IMAGES).shape == (32, 4)


def test_what_is_not_there_is_refused_with_the_reason() -> None:
    _, networks = placed(observed=False)
    switch, _ = switch_of(networks)
    assert switch.variants == ("fake_quant",)
    for variant, why in (("float", "no float training"), ("int8", "no range was observed")):
        with pytest.raises(ConfigurationError, match=why):
            switch.choose(variant)
    switch, _ = switch_of(placed(convert_on_fit_end=False)[1])
    with pytest.raises(ConfigurationError, match="convert_on_fit_end=False"):
        switch.network("int8")
