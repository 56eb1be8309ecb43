"""A network that is rehearsed and then prepared is exported once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.captured_once import captured_once
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import Lit, Net, loader, qat, trainer

EXAMPLE = Example((torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))


class Shaped(nn.Module):
    """A tied weight, a constant created by export, a plain tensor, a buffer, and a branch on an attribute."""

    def __init__(self, doubled: bool = False) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(36, 36), nn.Linear(36, 36)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.plain, self.doubled = torch.randn(36), doubled

    def forward(self, x: Tensor) -> Tensor:
        x = (self.bn(self.conv(x)) + self.shift).relu().mean(1).flatten(1)
        x = self.second(self.first(x) * self.plain + torch.tensor([0.5]))
        return x * 2 if self.doubled else x


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The exported networks."""
    found: list[Any] = []
    export = torch.export.export

    def counted(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.append(network)
        return export(network, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return found


def prepare(network: nn.Module, name: str = "net") -> nn.Module:
    return get_mode("pt2e").prepare(network, EXAMPLE, Recipe("pt2e", "x86"), prefix=name)


def test_a_copy_is_prepared_from_the_same_graph_with_its_own_weights(exports: list[Any]) -> None:
    network, other = Shaped(), Shaped()
    other.plain = network.plain
    expected = prepare(copy.deepcopy(other))
    with captured_once():
        prepare(copy.deepcopy(network))
        prepared = prepare(other)
    assert len(exports) == 2
    assert str(prepared.graph) == str(expected.graph)
    assert list(prepared.state_dict()) == list(expected.state_dict())
    assert prepared.get_parameter("first.weight") is other.first.weight is prepared.get_parameter("second.weight")
    assert torch.equal(prepared.train()(*EXAMPLE.args), expected.train()(*EXAMPLE.args))
    prepared(*EXAMPLE.args).sum().backward()
    assert other.conv.weight.grad is not None


@pytest.mark.slow
def test_what_differs_is_captured_by_itself(exports: list[Any]) -> None:
    with captured_once():
        once, twice = prepare(Shaped(), "a"), prepare(Shaped(doubled=True), "b")
        wider = Shaped()
        wider.first, wider.second = nn.Linear(36, 20), nn.Linear(20, 36)
        wider.plain = torch.randn(20)
        prepare(wider, "a")
    prepare(Shaped(), "a")
    assert len(exports) == 4
    assert str(once.graph) != str(twice.graph)


@pytest.mark.slow
def test_a_fit_with_a_rehearsal_exports_once_and_trains_the_same(
    exports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit() -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = Lit(Net())
        trainer(qat("pt2e")).fit(module, loader())
        return {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}

    found = fit()
    assert len(exports) == 1
    monkeypatch.setattr("qat_lightning.modes.pt2e.mode.captured", lambda network, example, name, capture: capture())
    expected = fit()
    assert len(exports) == 3
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
