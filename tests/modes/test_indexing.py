"""Prepared networks and their parts are indexed, iterated over and measured like the float network."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Example, Recipe, prepare
from qat_lightning.errors import NetworkError

MODES = ("eager", "fx", "pt2e")
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("without_compiler")


def sequence() -> nn.Sequential:
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Containers(nn.Module):
    """One container of each kind, and an index of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.ReLU()])
        self.heads = nn.ModuleDict({"first": nn.Linear(8, 4), "second": nn.Linear(8, 4)})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1))])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = x.mean((2, 3)) * self.scales[0]
        return self.heads["first"](x) + self.heads["second"](x)

    def __getitem__(self, name: str) -> Any:
        return self.heads[name]

    def __len__(self) -> int:
        return len(self.heads)


def forms(network: nn.Module, mode: str) -> list[Any]:
    prepared = prepare(network, Example((IMAGES,)), Recipe(mode, "x86"))
    return [prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))]


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_sequence_has_the_layers_that_train(mode: str) -> None:
    plain = sequence()
    for network in forms(sequence(), mode):
        parameters = dict(network.named_parameters())
        assert len(network) == len(list(network)) == len(plain)
        assert all(isinstance(layer, type(other)) for layer, other in zip(network, plain, strict=True))
        for name, layer in zip("05", (network[0], network[-1]), strict=True):
            assert layer.weight is parameters[f"{name}.weight"]
            assert layer.bias is parameters[f"{name}.bias"]
        assert network[1].running_mean is dict(network.named_buffers())["1.running_mean"]
        assert [name for name, _ in network[:2].named_parameters()] == [
            name for name, _ in plain[:2].named_parameters()
        ]


@pytest.mark.parametrize("mode", MODES)
def test_containers_in_a_network_and_its_own_index(mode: str) -> None:
    for network in forms(Containers(), mode):
        parameters = dict(network.named_parameters())
        assert network["first"].weight is network.heads["first"].weight is parameters["heads.first.weight"]
        assert network.stem[0].weight is parameters["stem.0.weight"]
        assert [len(part) for part in (network, network.stem, network.blocks, network.heads)] == [2, 3, 2, 2]
        assert [isinstance(block, nn.Conv2d) for block in network.blocks] == [True, False]
        assert "second" in network.heads
        assert list(network.heads) == list(network.heads.keys()) == ["first", "second"]
        assert [head.weight is parameters[f"heads.{name}.weight"] for name, head in network.heads.items()] == [True] * 2
        assert network.scales[0] is parameters["scales.0"]


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_what_is_changed_by_index_trains(mode: str) -> None:
    network = prepare(sequence(), Example((IMAGES,)), Recipe(mode, "x86"))
    network[0].weight.data.clamp_(-0.01, 0.01)
    network[0].bias = nn.Parameter(torch.full((8,), 0.5))
    parameters = dict(network.named_parameters())
    assert parameters["0.weight"].abs().max() <= 0.01
    assert parameters["0.bias"].tolist() == [0.5] * 8
    sum(layer.weight.norm() for layer in network if hasattr(layer, "weight")).backward()
    assert parameters["0.weight"].grad is not None


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_merged_layer_does_not_run_by_itself(mode: str) -> None:
    """It would return what several layers compute."""
    network = prepare(sequence(), Example((IMAGES,)), Recipe(mode, "x86"))
    with pytest.raises(NetworkError, match="mode='eager', in which every submodule stays callable"):
        network[0](IMAGES)
    with pytest.raises(NetworkError, match="mode='eager', in which every submodule stays callable"):
        network[:3](IMAGES)


def test_a_network_without_an_index_gets_none() -> None:
    network = prepare(nn.Sequential(sequence()), Example((IMAGES,)), Recipe("fx", "x86"))
    assert isinstance(network[0], nn.Module)
    whole: Any = prepare(Whole(), Example((IMAGES,)), Recipe("fx", "x86"))
    with pytest.raises(TypeError, match="no len"):
        len(whole)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
