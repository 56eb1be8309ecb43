"""Per-layer overrides: validated at creation, the last matching pattern applies, and serialization."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qat_lightning.errors import CheckpointMismatchError, ConfigurationError
from qat_lightning.modes.layer_schemes import check_overrides
from qat_lightning.modes.prepared import check_recipe
from qat_lightning.settings.kinds import check_kind
from qat_lightning.settings.overrides import FLOAT, Overrides, matches
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

LAYERS = ["net.stem", "net.blocks.0.conv", "net.blocks.1.conv", "net.head"]
OF_4_BITS: dict[str, Any] = {"weight_bits": 4}


def scheme(**overrides: Any) -> Scheme:
    return Scheme(weight_bits=6, overrides={name.replace("_", "."): fields for name, fields in overrides.items()})


def test_the_last_pattern_that_matches_decides_alone() -> None:
    found = Scheme(
        weight_bits=6,
        overrides={
            "net.*": {"weight_bits": 4, "weight_observer": "min_max"},
            "net.blocks": {"weight_bits": 3},
            "net.blocks.1": FLOAT,
            "net.blocks.1.conv": {"weight_bits": 8},
            "net.head": FLOAT,
        },
    )
    assert [found.of(layer).weight_bits for layer in LAYERS] == [4, 3, 8, 6]
    assert found.of("net.stem").weight_observer == "min_max"
    assert found.of("net.blocks.0.conv").weight_observer == "auto"  # nothing of the patterns before
    recipe = Recipe("fx", "x86", found)
    assert [recipe.selects(layer) for layer in LAYERS] == [True, True, True, False]
    assert not Recipe("fx", "x86", found, exclude=("net.stem",)).selects("net.stem")


@given(st.lists(st.sampled_from(["a", "a.b", "a.*", "*", "c"]), unique=True), st.sampled_from(["a.b", "c", "a"]))
def test_it_is_what_a_loop_over_the_patterns_finds(patterns: list[str], name: str) -> None:
    overrides = {pattern: {"weight_bits": 2 + number} for number, pattern in enumerate(patterns)}
    matching = [number for number, pattern in enumerate(patterns) if matches(pattern, name)]
    assert Scheme(overrides=overrides).of(name).weight_bits == (2 + matching[-1] if matching else 8)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("net", "use a mapping of patterns"),
        ([["net", FLOAT]], "use a mapping of patterns"),
        ({1: FLOAT}, "the pattern 1, which is not a name"),
        ({"net": {}}, "use the word 'float', or a mapping of weight_bits"),
        ({"net": "int4"}, "use the word 'float', or a mapping of weight_bits"),
        ({"net": {"weight_bit": 4}}, "did you mean 'weight_bits'"),
        ({"net": {"learned_step": "lsq"}}, "or set it for the whole network"),
        ({"net": {"activation_observer": "min_max"}}, "cannot be set for a single layer"),
        ({"net": {"weight_bits": 9}}, r"In scheme.overrides\['net'\]: scheme.weight_bits=9 is not valid"),
    ],
)
def test_what_is_not_possible_is_refused_with_what_is(overrides: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Scheme(overrides=overrides)


@pytest.mark.parametrize(
    ("recipe", "fields", "says"),
    [
        (("fx", "x86"), {"weight_granularity": "per_group", "weight_group_size": 32}, "kind='weight_only'"),
        (("pt2e", "x86", Scheme(weight_granularity="per_tensor")), {"weight_granularity": "per_channel"}, "per_tensor"),
        (("pt2e", "tests.support.quantizers.OwnQuantizer", Scheme(weight_bits=4)), {"weight_bits": 8}, "coarser"),
    ],
)
def test_what_a_kind_or_a_backend_has_not_is_refused_for_the_pattern(recipe: Any, fields: Any, says: str) -> None:
    mode, backend, *rest = recipe
    of_all = rest[0].to_dict() if rest else {}
    with pytest.raises(ConfigurationError, match=rf"In scheme.overrides\['net'\]: .*{says}"):
        Recipe(mode, backend, Scheme(**of_all, overrides={"net": fields}))


def test_what_a_kind_does_not_use_or_cannot_do_is_said_for_layers_too() -> None:
    with pytest.raises(ConfigurationError, match="activation_bits=4 is not supported with kind='dynamic'"):
        check_kind(Recipe("fx", "x86", Scheme(overrides={"net": {"activation_bits": 4}}), kind="dynamic"))
    with pytest.warns(UserWarning, match="leaves activations float, and does not use scheme.activation_bits=4"):
        check_kind(Recipe("fx", "x86", Scheme(overrides={"net": {"activation_bits": 4}}), kind="weight_only"))


def test_one_layer_that_no_kernel_runs_makes_the_network_simulated() -> None:
    assert Recipe("fx", "x86", scheme(net_head=OF_4_BITS)).simulated == ""
    found = Recipe("fx", "x86", scheme(net_head={"activation_bits": 4})).simulated
    assert "these have 4" in found
    assert "scheme.overrides['net.head']" in found


def test_a_pattern_that_matches_no_layer_is_refused_with_names_that_are_near() -> None:
    check_overrides(Recipe("fx", "x86", Scheme(overrides={"net.blocks": OF_4_BITS, "*.conv": FLOAT})), LAYERS)
    for pattern, near in (("net.haed", "Did you mean 'net.head'"), ("head", "Did you mean 'net.head'"), ("x", "are ")):
        with pytest.raises(ConfigurationError, match=near):
            check_overrides(Recipe("fx", "x86", Scheme(overrides={pattern: OF_4_BITS})), LAYERS)
    excluding = Recipe("fx", "x86", Scheme(overrides={"net.head": OF_4_BITS}), exclude=("net.head",))
    with pytest.raises(ConfigurationError, match="matches only layers that include= and exclude= leave float"):
        check_overrides(excluding, LAYERS)


def test_a_checkpoint_keeps_them_in_their_order() -> None:
    ours = Recipe("fx", "x86", Scheme(overrides={"net.*": OF_4_BITS, "net.head": FLOAT}))
    theirs = Recipe("fx", "x86", Scheme(overrides={"net.head": FLOAT, "net.*": OF_4_BITS}))
    assert Recipe.from_dict(ours.to_dict()) == ours
    assert ours != theirs
    with pytest.raises(CheckpointMismatchError, match=r"scheme\.overrides: \{'net\.\*'.*here, \{'net\.head'.*there"):
        check_recipe(ours, theirs.to_dict())


def test_a_checkpoint_of_before_there_were_any_is_one_without() -> None:
    entry = Recipe("fx", "x86").to_dict()
    assert "overrides" not in entry["scheme"]
    check_recipe(Recipe("fx", "x86"), entry)
    with pytest.raises(CheckpointMismatchError, match=r"scheme\.overrides: \{'net'.*here, \{\} there"):
        check_recipe(Recipe("fx", "x86", Scheme(overrides={"net": FLOAT})), entry)


def test_it_is_a_value() -> None:
    one = Scheme(overrides={"net.head": OF_4_BITS, "net.stem": FLOAT})
    other = Scheme(overrides=OmegaConf.create({"net.head": OF_4_BITS, "net.stem": FLOAT}))
    assert one == other == copy.deepcopy(one) == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(other)
    assert type(other.overrides["net.head"]) is dict
    assert isinstance(one.overrides, Overrides)
    assert one.overrides == {"net.head": OF_4_BITS, "net.stem": FLOAT}


NESTED = ["net.a", "net.a.b", "net.a.b.c", "net.d"]
FIELDS = st.sampled_from(
    [
        FLOAT,
        {"weight_bits": 8},
        {"weight_bits": 3},
        {"weight_bits": 4, "weight_observer": "mse"},
        {"activation_bits": 4},
    ]
)


@given(
    st.lists(st.tuples(st.sampled_from([*NESTED, "net.*", "net.a*", "*.b"]), FIELDS), max_size=4),
    st.dictionaries(st.sampled_from(NESTED), st.sampled_from([FLOAT, {"weight_bits": 8}, {"weight_bits": 6}])),
)
def test_layers_get_the_fields_that_are_changed_and_keep_the_others(patterns: Any, changes: dict[str, Any]) -> None:
    before = Scheme(weight_bits=6, overrides=dict(patterns))
    of_all = {"weight_bits": 6}
    overrides = Overrides.checked(before.overrides).with_layers(changes, of_all)
    after = Scheme(weight_bits=6, overrides=overrides)
    for name in NESTED:
        if name in changes:
            assert after.leaves_float(name) == (changes[name] == FLOAT)
            if changes[name] != FLOAT:
                assert after.of(name) == replace(before.of(name), **changes[name])
        elif not any(matches(changed, name) for changed in changes):
            assert (after.of(name), after.leaves_float(name)) == (before.of(name), before.leaves_float(name))
    assert overrides.with_layers(changes, of_all) == overrides
    assert before.overrides == dict(patterns), "the overrides that were changed stay"


def test_a_pattern_of_the_same_name_gives_way_and_a_wildcard_keeps_its_other_fields() -> None:
    first = Overrides.checked({"net.0": {"weight_bits": 8}, "net.*": OF_4_BITS})
    assert list(first.with_layers({"net.0": {"weight_bits": 8}}, {}).items()) == [
        ("net.*", OF_4_BITS),
        ("net.0", {"weight_bits": 8}),
    ]
    fields = {"weight_bits": 4, "weight_granularity": "per_tensor"}
    of_some = Overrides.checked({"net.b*": fields}).with_layers({"net.b0": {"weight_bits": 8}}, {})
    assert of_some.of("net.b0") == {"weight_bits": 8, "weight_granularity": "per_tensor"}
    assert of_some.of("net.b1") == fields


def test_layers_inside_of_others_keep_theirs_in_whatever_order_they_are_changed() -> None:
    overrides = Overrides.checked({"net.a": {"weight_bits": 4, "weight_observer": "mse"}})
    for names in (["net.a.b", "net.a"], ["net.a", "net.a.b"]):
        found = overrides.with_layers({name: {"weight_bits": 8 if name == "net.a.b" else 3} for name in names}, {})
        assert found.of("net.a") == {"weight_bits": 3, "weight_observer": "mse"}
        assert found.of("net.a.b") == {"weight_bits": 8, "weight_observer": "mse"}
    inside = Overrides().with_layers({"net.a": OF_4_BITS, "net.a.b": {"weight_bits": 6}}, {"weight_bits": 6})
    assert inside.of("net.a.b") == {"weight_bits": 6}, "the scheme's, but not its container's"
    assert Overrides().with_layers({"net.a": {"weight_bits": 6}}, {"weight_bits": 6}) == {}
