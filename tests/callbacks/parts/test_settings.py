"""The settings of a callback as one value."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, Scheme
from qat_lightning.callbacks.parts.settings import QuantizationSettings
from qat_lightning.errors import ConfigurationError


def test_the_recipe_is_made_once() -> None:
    settings = QuantizationSettings("fx", "x86", scheme=Scheme(weight_bits=4), exclude=["head"])
    assert settings.recipe_for("fx") is settings.recipe
    assert settings.recipe.scheme is settings.scheme
    assert settings.recipe.exclude == settings.exclude == ("head",)


def test_with_auto_it_has_any_mode_of_the_backend() -> None:
    settings = QuantizationSettings("auto", "x86", kind="static", include=["net.*"])
    for mode in ("eager", "fx", "pt2e"):
        recipe = settings.recipe_for(mode)
        assert (recipe.mode, recipe.kind, recipe.include) == (mode, "static", ("net.*",))
    with pytest.raises(ConfigurationError, match="qnnpack"):
        QuantizationSettings("auto", "qnnpack").recipe_for("pt2e")


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationSettings("fx", "x86").mode = "eager"  # type: ignore[misc]


def test_an_attribute_that_is_set_is_in_the_recipe_and_is_checked() -> None:
    qat = QuantizationAwareTraining(exclude=["head"])
    qat.exclude = ["stem"]
    assert qat.exclude == qat.settings.recipe.exclude == ("stem",)
    with pytest.raises(ConfigurationError, match="backend"):
        qat.backend = "nowhere"
    assert qat.backend == qat.settings.recipe.backend == "x86"
    ptq = PostTrainingQuantization(kind="dynamic")
    with pytest.raises(ConfigurationError, match="needs calibration data"):
        ptq.bias_correction = True
    assert ptq.bias_correction is False


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_a_copied_callback_has_settings_of_its_own(again) -> None:
    ptq = PostTrainingQuantization(exclude=["head"], calls=[torch.ones(2, 3)])
    other = again(ptq)
    other.exclude, other.calibration_batches = ["stem"], 3
    assert (ptq.exclude, ptq.calibration_batches) == (("head",), 32)
    assert (other.exclude, other.calibration_batches, other.kind) == (("stem",), 3, "static")
    assert torch.equal(other.calls[0], ptq.calls[0])
