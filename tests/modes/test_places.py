"""The names of places where a prepared network rounds are the float network's, in every mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.places import Place, find_places
from qat_lightning.modes.prepared import fake_quantizers
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.backends import pairs
from qat_lightning.settings.recipe import Recipe
from tests.support.networks import CASES, Case

TABLE = [
    pytest.param(mode, backend, case, id=f"{mode}-{backend}-{case.name}")
    for mode, backend in pairs()
    for case in CASES
    if mode in case.modes and (backend == "x86" or (backend == "xnnpack" and case.name == "residual"))
]


def places(mode: str, backend: str, case: Case) -> tuple[list[Place], set[FakeQuantize]]:
    args, kwargs, _ = case.batch(4)
    prepared = get_mode(mode).prepare(case.network(), Example(args, kwargs), Recipe(mode, backend))
    return find_places(prepared), {fq for _, fq in fake_quantizers(prepared)}


@pytest.mark.parametrize(("mode", "backend", "case"), TABLE)
def test_weights_and_their_activations_bear_the_layers_names(mode: str, backend: str, case: Case) -> None:
    found, quantizers = places(mode, backend, case)
    layers = dict(case.network().named_modules())
    weights = [place for place in found if place.what == "weight"]
    assert len({place.fq for place in weights}) == len(weights) >= case.layers
    for place in weights:
        name = place.layer.partition("_call_")[0]
        assert type(layers[name]).__name__ == place.kind
    assert {place.fq for place in found} == quantizers, "a FakeQuantize has no place"
    keys = [(place.layer, place.what) for place in found if place.what == "activation"]
    assert len(set(keys)) == len(keys), "two places have one name"


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_range_that_two_layers_share_has_a_place_at_each(mode: str) -> None:
    found, _ = places(mode, "x86", next(case for case in CASES if case.name == "functional"))
    shared = {place.layer: place for place in found if place.what == "activation"}
    assert shared["left"].fq is shared["right"].fq
    assert (shared["left"].module, shared["left"].turn) != (shared["right"].module, shared["right"].turn)


class SameName(nn.Module):
    """A parameter of forward has the name of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, table: Tensor) -> Tensor:
        return self.head(self.table(table))


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_an_input_is_not_taken_for_the_layer_of_its_name(mode: str) -> None:
    prepared = get_mode(mode).prepare(SameName(), Example((torch.randn(4, 4),)), Recipe(mode, "x86"))
    kinds = {place.layer: place.kind for place in find_places(prepared) if place.what == "activation"}
    assert kinds["table"] == "Linear"
    assert "input" in kinds.values()


def test_ops_are_named_after_their_module_and_their_function() -> None:
    residual = next(case for case in CASES if case.name == "residual")
    for mode in ("fx", "pt2e"):
        found, _ = places(mode, "x86", residual)
        assert ("add", "add") in [(place.layer, place.kind) for place in found], "the ReLU behind is not what adds"
        assert ("x", "input") in [(place.layer, place.kind) for place in found]
