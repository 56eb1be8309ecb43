"""Folding BatchNorm for inference: what is folded, that outputs stay the same, and errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import fuse
from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from tests.support.networks import CASES, Case, Plain, train

COUNTS = {
    "plain": 1, "residual": 2, "depthwise": 3, "linear": 0, "functional": 0, "several_inputs": 0,
    "shared_layers": 0, "attention": 0, "control_flow": 1,
}  # fmt: skip
"""In shared_layers one call of the convolution is followed by BatchNorm, and the other is not."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_trained_network_computes_the_same_and_is_left_as_it_is(case: Case) -> None:
    torch.manual_seed(0)
    network = case.network()
    train(network, case, steps=5)
    args, kwargs, _ = case.batch(8)
    before = copy.deepcopy(network.state_dict())
    fused, count = fuse(network, Example(args, kwargs))
    assert count == COUNTS[case.name]
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    args, kwargs, _ = case.batch(32)
    network.eval()
    with torch.no_grad():
        expected, actual = case.logits(network(*args, **kwargs)), case.logits(fused(*args, **kwargs))
    assert sqnr_db(expected, actual) > 90
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (network, fused)]
    assert norms[0] - norms[1] == count


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise"])
def test_the_count_is_that_of_conversion(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    args, kwargs, _ = case.batch(4)
    _, count = fuse(case.network(), Example(args, kwargs))
    prepared = get_mode("eager").prepare(case.network(), Example(args, kwargs), Recipe("eager", "x86"))
    chains = prepared._quantization.plan["chains"]
    assert count == sum(chain["batchnorm"] is not None for chain in chains)


class Peeks(nn.Module):
    """Looks up its BatchNorm."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.attribute = attribute

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x * getattr(self.bn, self.attribute) if self.attribute else x + isinstance(self.bn, nn.Identity)


@pytest.mark.parametrize(
    ("attribute", "message"), [("eps", "does not run once 1 BatchNorm"), ("", "computes different values once 1")]
)
def test_what_computes_something_else_is_refused(attribute: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        fuse(Peeks(attribute), torch.randn(4, 3, 8, 8))


class Tapped(nn.Module):
    """BatchNorm and another op read the convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(self.bn(x)) + x


def test_a_layer_whose_output_is_used_twice_is_not_folded() -> None:
    assert fuse(Tapped(), torch.randn(4, 3, 8, 8))[1] == 0


def test_linear_layers_and_layers_without_affine_are_folded() -> None:
    network = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, affine=False), nn.ReLU(), nn.Linear(5, 2))
    network(torch.randn(64, 6) * 3 + 1)
    fused, count = fuse(network, (torch.randn(4, 6),))
    assert count == 1
    x = torch.randn(16, 6)
    torch.testing.assert_close(fused(x), network.eval()(x))


def test_a_prepared_network_is_refused() -> None:
    x = torch.randn(4, 3, 8, 8)
    prepared = get_mode("fx").prepare(Plain(), Example((x,)), Recipe("fx", "x86"))
    with pytest.raises(NetworkError, match="give the float network"):
        fuse(prepared, x)


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(NetworkError, match="does not run on its example"):
        fuse(Plain(), torch.randn(4, 5))
