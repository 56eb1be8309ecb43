"""Forms of ``backend=`` other than a name, and what a recipe stores of them."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
from omegaconf import OmegaConf

from qat_lightning.errors import CombinationError, ConfigurationError
from qat_lightning.settings.kinds import check_kind, table
from qat_lightning.settings.quantizers import QuantizerSource, imported
from qat_lightning.settings.recipe import Recipe
from tests.support.quantizers import OwnQuantizer, wide_quantizer

PATH = "tests.support.quantizers.OwnQuantizer"
BUILT = {"_target_": PATH, "dtype": "int16", "symmetric": True}


@pytest.mark.parametrize(
    ("given", "path", "arguments"),
    [
        (PATH, PATH, {}),
        (OwnQuantizer, PATH, {}),
        (wide_quantizer, "tests.support.quantizers.wide_quantizer", {}),
        (BUILT, PATH, {"dtype": "int16", "symmetric": True}),
        (OmegaConf.create(BUILT), PATH, {"dtype": "int16", "symmetric": True}),
        (functools.partial(OwnQuantizer, bias=True), PATH, {"bias": True}),
        ({"_target_": PATH, "deep": [1, {"_target_": "a.b"}]}, PATH, {"deep": [1, {"_target_": "a.b"}]}),
    ],
)
def test_a_path_and_plain_arguments_survive_a_checkpoint(given: Any, path: str, arguments: dict[str, Any]) -> None:
    recipe = Recipe("pt2e", given)
    assert (recipe.backend, recipe.quantizer.keywords) == (path, arguments)  # type: ignore[union-attr]
    again = Recipe.from_dict(recipe.to_dict())
    assert again == recipe
    assert not again.differences(recipe)
    assert hash(again) == hash(recipe)


def test_an_instance_is_known_by_its_class_and_not_rebuilt() -> None:
    recipe = Recipe("pt2e", OwnQuantizer())
    again = Recipe.from_dict(recipe.to_dict())
    assert (recipe.backend, again.quantizer.made, again.quantizer.arguments) == (PATH, None, None)  # type: ignore[union-attr]
    assert not again.differences(recipe)
    assert copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe)) == recipe
    (difference,) = Recipe("pt2e", PATH).differences(recipe)
    assert difference.startswith("quantizer: ")


def test_what_is_made_where_no_other_process_finds_it_is_an_instance() -> None:
    made = QuantizerSource.of(lambda: OwnQuantizer("uint8"))
    assert isinstance(made.made, OwnQuantizer)
    assert made.arguments is None


def test_another_argument_is_another_recipe() -> None:
    other = Recipe("pt2e", {**BUILT, "dtype": "int8"})
    assert other.differences(Recipe("pt2e", BUILT))
    assert not other.differences(Recipe("pt2e", dict(reversed(list({**BUILT, "dtype": "int8"}.items())))))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, "a dotted path such as 'package.module.Class'"),
        (object(), "a dotted path such as 'package.module.Class'"),
        ({"path": PATH}, "no '_target_' with a dotted path"),
        ({"_target_": PATH, "_partial_": True}, "'_partial_' is not valid"),
        ({"_target_": PATH, "dtype": object()}, "cannot be stored in a checkpoint"),
        (lambda: 3, "is not a PT2E quantizer"),
        (lambda more: more, "cannot be called without arguments"),
        ("tpu", "'package.module.Class'"),
    ],
)
def test_what_is_no_quantizer_is_refused(given: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=r"backend=") as error:
        Recipe("pt2e", given)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no_such_package.Quantizer", "No module named 'no_such_package'"),
        ("tests.support.quantizers.Other", "has no 'Other'"),
        ("tests.support.none.Other", "has no 'none'"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(path: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be imported") as error:
        imported(path)
    assert says in str(error.value)


@pytest.mark.parametrize("mode", ["eager", "fx", "parts"])
def test_other_modes_have_no_such_backend(mode: str) -> None:
    with pytest.raises(CombinationError, match="use mode='pt2e'"):
        Recipe(mode, PATH)


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
def test_kinds_without_calibration_have_none(kind: Any) -> None:
    with pytest.raises(CombinationError, match="kind='static'"):
        check_kind(Recipe("pt2e", PATH, kind=kind))
    assert not any(backend == PATH for _, _, backend in table())
