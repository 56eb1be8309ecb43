"""Schemes and recipes: validated at creation, and restored from checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_lightning.errors import CheckpointMismatchError, ConfigurationError
from qat_lightning.modes.prepared import check_recipe
from qat_lightning.settings.recipe import Recipe, check_globs
from qat_lightning.settings.scheme import Scheme

ANY = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=5))


@given(st.sampled_from([field.name for field in dataclasses.fields(Scheme)]), ANY)
def test_a_scheme_is_possible_or_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    refusal = ""
    try:
        scheme = Scheme(**{field: value})
    except ConfigurationError as error:
        refusal = str(error)
    if refusal:
        assert f"scheme.{field}=" in refusal
        assert "use " in refusal
    else:
        assert getattr(scheme, field) == ({} if field == "overrides" else value)
        assert 1 <= scheme.weight_quant_max <= 127


@given(
    st.sampled_from([("fx", "x86"), ("eager", "qnnpack"), ("pt2e", "xnnpack")]),
    st.integers(2, 8),
    st.lists(st.text("ab.*", min_size=1, max_size=4), max_size=2),
)
def test_a_recipe_survives_a_checkpoint(pair: tuple[str, str], bits: int, globs: list[str]) -> None:
    recipe = Recipe(*pair, Scheme(weight_bits=bits), exclude=tuple(globs))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    check_recipe(recipe, recipe.to_dict())


def test_another_recipe_is_refused_with_both_sides_named() -> None:
    with pytest.raises(CheckpointMismatchError, match=r"backend: 'x86' here, 'fbgemm' there"):
        check_recipe(Recipe("fx", "x86"), Recipe("fx", "fbgemm").to_dict())


def test_a_file_of_another_format_is_refused() -> None:
    with pytest.raises(CheckpointMismatchError, match="format 99"):
        Recipe.from_dict(Recipe("fx", "x86").to_dict() | {"format": 99})


@pytest.mark.parametrize("scheme", [Scheme(activation_bits=4), Scheme(weight_symmetric=False)], ids=["w8a4", "affine"])
def test_only_fixed_ranges_are_simulated(scheme: Scheme) -> None:
    for kind in ("qat", "static"):
        assert Recipe("fx", "x86", scheme, kind=kind).simulated
    for kind in ("dynamic", "weight_only"):
        assert not Recipe("fx", "x86", scheme, kind=kind).simulated


def test_selection_follows_parents_and_exclusion_wins() -> None:
    recipe = Recipe("fx", "x86", include=("body",), exclude=("body.last*",))
    assert recipe.selects("body.first.conv")
    assert not recipe.selects("head")
    assert not recipe.selects("body.last_block.conv")


@pytest.mark.parametrize("globs", ["head", [3], [""]])
def test_globs_that_are_none_are_refused(globs: Any) -> None:
    with pytest.raises(ConfigurationError, match="exclude="):
        Recipe("fx", "x86", exclude=globs)


def test_a_glob_that_matches_nothing_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"exclude='haed' matches no module: the network has stem, head"):
        check_globs(Recipe("fx", "x86", exclude=("haed",)), ["stem", "head"])
    with pytest.raises(ConfigurationError, match=r"Did you mean 'net\.head'\?"):
        check_globs(Recipe("fx", "x86", exclude=("head",)), ["net", "net.stem", "net.head"])
