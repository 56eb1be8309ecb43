"""Prepared networks are in place in time and checked on loading, and nothing else remains on the LightningModule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qat_lightning.callbacks.parts.checkpoint_io import WholeFileCheckpointIO
from qat_lightning.callbacks.parts.float_weights import FloatWeights
from qat_lightning.callbacks.parts.networks import BEFORE, Networks
from qat_lightning.callbacks.parts.placement import Placement
from qat_lightning.callbacks.parts.preparation import Preparation
from qat_lightning.callbacks.parts.settings import QuantizationSettings
from qat_lightning.errors import CheckpointMismatchError
from qat_lightning.modes.prepared import is_prepared
from tests.callbacks.lit import Lit, assert_same_state, state, trainer
from tests.callbacks.parts.placed import IMAGES


def placement_of(**settings: Any) -> tuple[Placement, Networks]:
    networks = Networks(QuantizationSettings("fx", "x86", example_inputs=IMAGES[:4], **settings))
    floats = FloatWeights(networks)
    return Placement(networks, Preparation(networks, floats), floats), networks


def arranged(lit: Lit, **settings: Any) -> tuple[Placement, Networks, Any, list[str]]:
    placement, networks = placement_of(**settings)
    happened: list[str] = []
    used = trainer()
    placement.arrange(
        used, lit, "test", prepared=lambda: happened.append("prepared"), loaded=lambda source: happened.append(source)
    )
    return placement, networks, used, happened


def test_networks_are_prepared_as_the_model_is_configured_and_not_before() -> None:
    lit = Lit()
    _, networks, _, happened = arranged(lit)
    assert not is_prepared(lit.net)
    assert not happened
    lit.configure_model()
    assert is_prepared(lit.net)
    assert networks.prepared == {"net": lit.net}
    assert networks.phase == BEFORE
    assert happened == ["prepared"]
    assert "configure_model" not in vars(lit)


def test_loading_is_seen_and_a_float_state_completed() -> None:
    lit, floating = Lit(), Lit()
    placement, _, _, happened = arranged(lit)
    lit.configure_model()
    lit.load_state_dict(floating.state_dict())
    assert torch.equal(lit.net.head.weight, floating.net.head.weight)
    assert happened == ["prepared", "weights that were loaded"]
    other = Lit()
    arranged(other, exclude=["net.head"])
    other.configure_model()
    with pytest.raises(CheckpointMismatchError):
        lit.load_state_dict(other.state_dict())
    placement.leave_nothing()
    lit.load_state_dict(lit.state_dict())
    assert happened == ["prepared", "weights that were loaded"]


def test_the_same_lightning_module_is_not_prepared_again() -> None:
    lit = Lit()
    placement, networks, used, happened = arranged(lit)
    lit.configure_model()
    placement.leave_nothing()
    net, before = lit.net, state(lit)
    placement.arrange(used, lit, "test", prepared=lambda: happened.append("again"), loaded=happened.append)
    lit.configure_model()
    assert lit.net is net
    assert networks.prepared == {"net": net}
    assert happened == ["prepared"]
    assert_same_state(state(lit), before)


def test_nothing_is_left_behind_if_the_model_is_never_configured() -> None:
    lit = Lit()
    placement, _, used, _ = arranged(lit)
    assert isinstance(used.strategy.checkpoint_io, WholeFileCheckpointIO)
    placement.leave_nothing()
    assert "configure_model" not in vars(lit)
    assert not isinstance(used.strategy.checkpoint_io, WholeFileCheckpointIO)
    lit.configure_model()
    assert not is_prepared(lit.net)
