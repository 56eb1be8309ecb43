"""The largest submodules that mode fx supports."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.fx.mode import FxMode
from qat_lightning.modes.parts.finding import Found, find_parts
from qat_lightning.settings.recipe import Recipe
from tests.modes.parts.networks import Detector


def _found(network: nn.Module, *args: Tensor) -> Found:
    recipe = Recipe("fx", "x86")
    return find_parts(
        network,
        Example(args),
        lambda name, module, calls: FxMode().prepare(module, calls[0], recipe, prefix=name),
    )


def test_finds_the_largest_submodules_and_their_calls_and_changes_nothing() -> None:
    network = Detector()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = _found(network, torch.randn(2, 3, 16, 16))
    assert list(found.parts) == ["body", "head"]
    assert [tuple(call.args[0].shape) for call in found.parts["head"]] == [(2, 8, 16, 16), (2, 8, 8, 8)]
    assert found.refused == {}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Encoder(nn.Module):
    """Two layers, the first with an additional method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())

    def encode(self, x: Tensor) -> Tensor:
        return self.first(x)


class Around(nn.Module):
    """Code that uses a submodule in other ways than by its forward."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.inner = way, Encoder()
        self.__dict__["others"] = [self.inner]

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "alias":
            return self.others[0](x)
        y = self.inner(x)
        ways = {
            "method": lambda: self.inner.encode(y),
            "child": lambda: self.inner.first(y),
            "weight": lambda: F.linear(y, self.inner.first.weight),
            "attribute": lambda: y * self.inner.first.in_features,
        }
        return ways[self.way]()


@pytest.mark.parametrize("way", ["method", "child", "weight", "attribute", "alias"])
def test_what_is_reached_beside_its_forward_is_descended_into(way: str) -> None:
    found = _found(Around(way), torch.randn(4, 8))
    assert "inner" in found.refused
    assert "outside of it" in found.refused["inner"]
    assert "inner.second" in found.parts
    assert ("inner.first" in found.parts) is (way not in ("weight", "attribute"))


def test_what_shares_a_layer_with_another_part_is_descended_into() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.two = nn.Sequential(nn.Linear(8, 8), self.one[2])

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    found = _found(Sharing(), torch.randn(4, 8))
    assert list(found.parts) == ["one.0", "one.2", "two.0"]
    assert "'one.2', which is also used outside of it, as 'two.1'" in found.refused["one"]
