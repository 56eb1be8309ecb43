"""Recipes find the input of a layer however it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.layers.inputs import input_of
from qat_lightning.modes.registry import get_mode
from qat_lightning.recipes.adaround import AdaRound, adaround
from qat_lightning.recipes.batchnorm import reestimate_batchnorm
from qat_lightning.recipes.bias_correction import correct_biases
from qat_lightning.recipes.sequential_mse import sequential_mse
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

RECIPES: dict[str, Callable[[nn.Module, list[Tensor]], Any]] = {
    "bias_correction": correct_biases,
    "sequential_mse": sequential_mse,
    "adaround": lambda prepared, batches: adaround(prepared, batches, AdaRound(50)),
    "adaround_blocks": lambda prepared, batches: adaround(prepared, batches, AdaRound(50, blocks=["part"])),
    "batchnorm": reestimate_batchnorm,
}


class ByPosition(nn.Module):
    """A convolution, a BatchNorm that is not folded into it, a submodule with a convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.part, self.fc = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.part(self.bn(torch.relu(self.conv(x)))).mean((2, 3)))


class ByKeyword(ByPosition):
    """The same, with the argument's name in each call."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(input=torch.relu(self.conv(input=x)))
        return self.fc(input=self.part(input=x).mean((2, 3)))


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(3)]


def prepare(mode: str, network: nn.Module, example: Tensor) -> nn.Module:
    recipe = Recipe(mode, "x86", Scheme(weight_bits=4, weight_observer="mse"), kind="static")
    prepared = get_mode(mode).prepare(network.eval(), Example((example,)), recipe)
    calibrate(prepared, [example])
    return prepared


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_a_layer_called_by_keyword_gets_what_one_called_by_position_gets(mode: str, recipe: str) -> None:
    moved: list[dict[str, Tensor]] = []
    for make in (ByPosition, ByKeyword):
        torch.manual_seed(0)
        prepared = prepare(mode, make(), images()[0])
        before = {key: value.clone() for key, value in prepared.state_dict().items() if isinstance(value, Tensor)}
        RECIPES[recipe](prepared, images())
        moved.append({k: value for k, value in prepared.state_dict().items() if not torch.equal(value, before[k])})
    assert moved[0]
    # PyTorch's preparation in fx rounds no input given by keyword, and BatchNorm is measured in the prepared network.
    apart = 0.01 if (mode, recipe) == ("fx", "batchnorm") else 0.0
    torch.testing.assert_close(*moved, rtol=0, atol=apart)


class One(nn.Module):
    """A convolution on one image without a batch dimension, and a linear layer on one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((-2, -1)))


@pytest.mark.parametrize("recipe", ["bias_correction", "sequential_mse", "adaround"])
def test_a_layer_called_without_a_batch_dimension_gets_what_a_batch_of_one_gets(recipe: str) -> None:
    alone = [image for batch in images() for image in batch]
    results = []
    for batches in (alone, [image[None] for image in alone]):
        torch.manual_seed(0)
        prepared = prepare("eager", One(), batches[0])
        results.append(RECIPES[recipe](prepared, batches))
    assert set(results[0]) == {"conv", "fc"}
    assert results[0] == results[1]


def test_the_input_comes_before_other_arguments() -> None:
    x = torch.zeros(1)
    assert input_of((x, 3), {"other": 4}) is x
    assert input_of((), {"x": x}) is x
