"""Folding BatchNorm and restoring it: the network computes the same in evaluation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.recipes.folding import fold_batchnorm, unfold_state
from tests.recipes.test_equalization import unfair
from tests.support.networks import CASES

CASE = {case.name: case for case in CASES}
FOLDS = {"plain": 1, "residual": 2, "depthwise": 3, "control_flow": 1}


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(sorted(FOLDS)), seed=st.integers(0, 99))
def test_folded_and_unfolded_compute_the_same(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    case = CASE[name]
    network = unfair(case.network(), seed).eval()
    args, kwargs, _ = case.batch(8)
    before = copy.deepcopy(network)
    parameters = {id(parameter) for parameter in network.parameters()}
    folded = fold_batchnorm(network, Example(args, kwargs))
    assert len(folded) == FOLDS[name]
    expected = before(*args, **kwargs)
    torch.testing.assert_close(network(*args, **kwargs), expected, atol=1e-3, rtol=1e-3)
    # Weights are the same parameters; only biases may be new.
    assert {name for name, parameter in network.named_parameters() if id(parameter) not in parameters} <= {
        f"{values['layer']}.bias" for values in folded.values()
    }
    state: dict[str, Any] = {f"net.{key}": value for key, value in network.state_dict().items()}
    unfold_state(state, folded, "net.")
    again = case.network().eval()
    again.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    torch.testing.assert_close(again(*args, **kwargs), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_every_kind_of_layer_and_batchnorm(kind: str, affine: bool, bias: bool) -> None:
    def make() -> Any:
        if kind == "linear":
            return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6, affine=affine, eps=0.1)).eval()
        return nn.Sequential(nn.Conv2d(4, 6, 1, bias=bias), nn.BatchNorm2d(6, affine=affine, eps=0.1)).eval()

    network, x = make(), torch.randn(5, 4) if kind == "linear" else torch.randn(5, 4, 3, 3)
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.5, 2)
    expected = network(x)
    folded = fold_batchnorm(network, Example((x,)))
    torch.testing.assert_close(network(x), expected)
    state = dict(network.state_dict())
    unfold_state(state, folded)
    again = make()
    again.load_state_dict(state)
    torch.testing.assert_close(again(x), expected)


def test_what_does_not_fold_stays() -> None:
    class Standing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.twice = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
            self.after, self.first = nn.BatchNorm2d(4), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.first(x))
            x = self.norm(x) + x
            return self.after(self.twice(self.twice(x)))

    with pytest.raises(ConfigurationError, match="finds no BatchNorm in Standing"):
        fold_batchnorm(Standing(), Example((torch.randn(2, 3, 4, 4),)))


class Reads(nn.Module):
    """Also reads a tensor that folding would change."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.other, self.other_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.what = what

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.other_bn(self.other(self.bn(self.conv(x))))
        if self.what == "batchnorm":
            return y, self.bn.weight.abs().sum()
        return y, torch.nn.functional.conv2d(x, self.conv.weight)


@pytest.mark.parametrize("what", ["batchnorm", "layer"])
def test_what_the_network_reads_besides_is_not_folded(what: str) -> None:
    torch.manual_seed(0)
    network = unfair(Reads(what), 0).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = network(x)
    assert set(fold_batchnorm(network, Example((x,)))) == {"other_bn"}
    torch.testing.assert_close(network(x), expected, atol=1e-4, rtol=1e-4)
