"""Mode fx quantizes a function under each of its names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.layers.operators import operator_of
from qat_lightning.modes.fx import aliases
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TWINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda x, y: torch.relu(x),
    "relu_": lambda x, y: torch.relu_(x),
    "F.relu_": lambda x, y: F.relu_(x),
    "leaky_relu_": lambda x, y: F.leaky_relu_(x, 0.1),
    "elu_": lambda x, y: F.elu_(x),
    "hardtanh_": lambda x, y: F.hardtanh_(x, 0.0, 6.0),
    "clamp_min": lambda x, y: x.clamp_min(0),
    "torch.clamp_min": lambda x, y: torch.clamp_min(x, 0),
    "add": lambda x, y: x.add(y),
    "mul": lambda x, y: x.mul(y),
    "multiply": lambda x, y: torch.multiply(x, y),
    "concat": lambda x, y: torch.concat([x, y], 2),
    "concatenate": lambda x, y: torch.concatenate((x, y), dim=2),
    "max_pool2d": lambda x, y: torch.max_pool2d(x, 2),
    "matmul": lambda x, y: x @ y,
    "bmm": lambda x, y: x.flatten(0, 1).bmm(y.flatten(0, 1)).reshape(x.shape),
}


class Network(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.one(x), self.other(x)))


@pytest.mark.parametrize("name", TWINS)
def test_each_is_int8(name: str) -> None:
    torch.manual_seed(0)
    flow, example = get_mode("fx"), Example((IMAGES,))
    prepared = flow.prepare(Network(TWINS[name]), example, Recipe("fx", "x86"))
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    prepared.train()(IMAGES).square().mean().backward()
    converted = flow.convert(cpu_copy(prepared), example)
    assert all(row.quantized for row in converted.operations), converted.operations
    assert min(check.sqnr_db for check in converted.checks) > 50


def test_aliases_are_of_one_row() -> None:
    for table in (aliases._FUNCTIONS, aliases._IN_PLACE, aliases._OF_TWO):
        for name, twin in table.items():
            assert operator_of(name) is operator_of(twin) is not None, name


def test_an_average_is_said_to_have_a_coarser_kernel() -> None:
    prepared = get_mode("fx").prepare(
        Network(lambda x, y: F.adaptive_avg_pool2d(x, 1)), Example((IMAGES,)), Recipe("fx", "x86")
    )
    (row,) = [row for row in get_mode("fx").coverage(cpu_copy(prepared), Example((IMAGES,))) if row.what == "op"]
    assert row.reason.endswith("rounds to the coarser grid of its input")


def test_what_takes_more_than_its_twin_stays_what_it_is() -> None:
    prepared = get_mode("fx").prepare(Network(lambda x, y: x.add(y, alpha=2)), Example((IMAGES,)), Recipe("fx", "x86"))
    assert [node.target for node in prepared.graph.nodes if node.op == "call_method"] == ["add"]


def test_a_recipe_of_an_earlier_release_leaves_them_as_they_were() -> None:
    recipe = Recipe("fx", "x86", families=("attention",))
    prepared = get_mode("fx").prepare(Network(TWINS["relu"]), Example((IMAGES,)), recipe)
    assert any(node.target is torch.relu for node in prepared.graph.nodes)
