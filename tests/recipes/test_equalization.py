"""Equalization keeps the outputs of a network, and makes ranges equal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.recipes import equalization
from qat_lightning.recipes.equalization import equalize
from tests.support.networks import CASES, Depthwise


def unfair(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give channels and statistics very different sizes, as in MobileNets."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, spread in ((module.weight, 3.0), (module.running_var, 2.0)):
                tensor.data.copy_(torch.exp(spread * (torch.rand(tensor.shape, generator=generator) - 0.5)))
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))  # type: ignore[union-attr]
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator))
    return network


@settings(max_examples=15, deadline=None)
@given(index=st.integers(0, len(CASES) - 1), seed=st.integers(0, 99))
def test_the_network_computes_the_same(index: int, seed: int) -> None:
    """On other inputs than the example, in evaluation and in training, for every network of the table."""
    torch.manual_seed(seed)
    case = CASES[index]
    network = unfair(case.network(), seed)
    args, kwargs, _ = case.batch(8)
    before = copy.deepcopy(network)
    equalize(network, Example(args, kwargs))
    assert network.state_dict().keys() == before.state_dict().keys()
    args, kwargs, _ = case.batch(16)
    for mode in (False, True):
        outputs = []
        for each in (before.train(mode), network.train(mode)):
            torch.manual_seed(1)
            outputs.append(case.logits(each(*args, **kwargs)))
        scale = float(outputs[0].detach().abs().max())
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4 * scale, rtol=1e-3)


def test_ranges_of_neighbours_are_equal_through_depthwise_layers() -> None:
    torch.manual_seed(0)
    network = unfair(Depthwise())
    example = Example((torch.randn(8, 3, 8, 8),))
    done = equalize(network, example, "replace_relu6")
    assert done.pairs == [("expand.0", "depthwise.0"), ("depthwise.0", "project.0"), ("project.0", "head.1")]
    assert done.replaced == ["expand.2", "depthwise.2"]
    assert done.change > 0
    assert "3 pairs of layers were equalized, 2 ReLU6 became ReLU" in str(done)
    net: Any = network

    def folded(block: Any) -> Tensor:
        factor = block[1].weight / (block[1].running_var + block[1].eps).sqrt()
        return (block[0].weight * factor.reshape(-1, 1, 1, 1)).abs()

    torch.testing.assert_close(
        folded(net.expand).amax((1, 2, 3)), net.depthwise[0].weight.abs().amax((1, 2, 3)), rtol=0.01, atol=0
    )
    torch.testing.assert_close(
        folded(net.depthwise).amax((1, 2, 3)), net.project[0].weight.abs().amax((0, 2, 3)), rtol=0.01, atol=0
    )


def test_relu6_is_kept_where_the_network_is_to_stay_the_same() -> None:
    network = Depthwise()
    done = equalize(network, Example((torch.randn(8, 3, 8, 8),)))
    assert done.pairs == [("project.0", "head.1")]
    assert isinstance(network.expand[2], nn.ReLU6)
    assert "2 pairs have a ReLU6 between them" in str(done)


class Groups(nn.Module):
    """Grouped convolutions, a Conv1d-like chain of linear layers, a shared layer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 1, groups=2)
        self.second = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.twice = nn.Linear(12, 12)
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(F.max_pool2d(self.first(x), 2), 0.1)
        x = self.second(x).mean((2, 3))
        return self.two(F.relu(self.one(F.relu(self.twice(F.relu(self.twice(x)))))))


def test_groups_shared_layers_and_tied_weights() -> None:
    torch.manual_seed(0)
    network = Groups()
    before = copy.deepcopy(network)
    with torch.no_grad():
        for each in (network, before):
            each.first.weight[3] *= 100
    before = copy.deepcopy(network)
    x = torch.randn(4, 4, 8, 8)
    done = equalize(network, Example((x,)))
    assert done.pairs == [("first", "second")]
    assert done.left["twice"] == "it is called several times"
    assert "shared" in done.left["one"]
    torch.testing.assert_close(network(x), before(x), rtol=1e-4, atol=1e-4)
    assert network.first.weight.abs().max() < before.first.weight.abs().max()


def test_what_mixes_channels_is_left_alone() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).reshape(-1, 2, 3).transpose(1, 2).reshape(-1, 6))

    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).mean(0))

    class MeanOfChannels(Averaging):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).mean(1).reshape(1, 6))

    x = torch.randn(6, 6)
    assert equalize(Mixing(), Example((x,))).pairs == []
    assert equalize(Averaging(), Example((x,))).pairs == [("first", "second")]
    left = equalize(MeanOfChannels(), Example((x,)))
    assert left.pairs == []
    assert left.left == {"first": "a factor does not pass to the next layer"}


def test_dead_channels_stay() -> None:
    network: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        network[0].weight[1] = 0
        network[2].weight[:, 2] = 0
    equalize(network, Example((torch.randn(8, 4),)))
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_a_change_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(pairs: list[Any]) -> None:
        pairs[0].first.weight.mul_(2)

    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    before = copy.deepcopy(network.state_dict())
    monkeypatch.setattr(equalization, "_balance", spoil)
    with pytest.raises(NetworkError, match="would change what Sequential computes"):
        equalize(network, Example((torch.randn(8, 4),)))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_an_unknown_kind() -> None:
    with pytest.raises(ConfigurationError, match="'none', 'exact', 'replace_relu6'"):
        equalize(nn.Linear(2, 2), Example((torch.randn(2, 2),)), "all")  # type: ignore[arg-type]
