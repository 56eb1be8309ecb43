"""Concatenations: one range for inputs with different ranges, partly float or after dropout, in every mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.exactness import EXACT
from tests.support.networks import CLASSES


class ImageAndTable(nn.Module):
    """The mean of an image, which stays float in mode fx, and a table, directly and after dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.table = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(29, CLASSES)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.cat([F.relu(self.conv(image)).mean((2, 3)), table, self.table(table)], 1))


class MapAndMean(nn.Module):
    """The output of an int8 convolution and its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        x = F.relu(self.conv(image))
        return self.head(torch.cat([x, x.mean((2, 3), keepdim=True).expand_as(x)], 1)).mean((2, 3))


class SmallAndLarge(nn.Module):
    """Two convolutions, one with values a hundred times as large as the other's."""

    def __init__(self, stacked: bool = False) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.large.weight.data *= 100
        self.head = nn.Conv2d(16, CLASSES, 1)
        self.stacked = stacked

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        parts = [F.relu(self.small(image)), self.large(image)]
        x = torch.stack(parts, 1).flatten(1, 2) if self.stacked else torch.cat(parts, 1)
        return self.head(x).mean((2, 3))


class Dense(nn.Module):
    """Nested concatenations; a convolution's input, after dropout, with its output and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.drop, self.pool = nn.Dropout(0.3), nn.MaxPool2d(3, 1, 1)
        self.second = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        x = self.drop(F.relu(self.stem(image)))
        x = torch.cat([x, self.first(x), self.pool(x)], 1)
        x = torch.cat([x, F.relu(self.second(x))], 1)
        return self.head(x.mean((2, 3)))


def prepare(network: nn.Module, recipe: Recipe, factor: float = 1.0) -> tuple[nn.Module, Example]:
    """Trained on one batch, then on batches scaled by ``factor``, one of which is returned."""
    torch.manual_seed(0)
    batches = [(torch.randn(16, 3, 8, 8) + 1, torch.randn(16, 5)) for _ in range(40)]
    prepared = get_mode(recipe.mode).prepare(network, Example(batches[0]), recipe)
    prepared.train()
    for number, (image, table) in enumerate(batches):
        image, table = (image, table) if number == 0 else (image * factor, table * factor)
        prepared(image, table)
    return prepared, Example((image, table))


NETWORKS = (ImageAndTable, MapAndMean, SmallAndLarge, Dense)


@pytest.mark.parametrize("exclude", [(), ("head",)], ids=["head-int8", "head-float"])
@pytest.mark.parametrize(
    ("mode", "network"),
    [
        *((mode, network) for mode in ("eager", "fx") for network in NETWORKS),
        pytest.param("pt2e", ImageAndTable, marks=pytest.mark.slow),
    ],
)
def test_int8_joins_what_fake_quant_joins(mode: str, network: type[nn.Module], exclude: tuple[str, ...]) -> None:
    prepared, example = prepare(network(), Recipe(mode, "x86" if mode == "pt2e" else EXACT, exclude=exclude))
    converted = get_mode(mode).convert(cpu_copy(prepared), example)
    # A head of few values is at 54 dB if one of them is a tie that its kernel rounds the other way.
    assert all(check.sqnr_db > 60 or check.max_steps <= 1 for check in converted.checks), converted.checks
    with torch.no_grad():
        assert sqnr_db(cpu_copy(prepared)(*example.args), converted.network(*example.args)) > 40


@pytest.mark.parametrize("network", NETWORKS)
def test_scales_that_learn_are_joined_alike(network: type[nn.Module]) -> None:
    """They begin with an observed range, here with fake-quantization disabled."""
    torch.manual_seed(0)
    example = Example((torch.randn(16, 3, 8, 8), torch.randn(16, 5)))
    prepared = get_mode("fx").prepare(network(), example, Recipe("fx", EXACT, Scheme(learned_step="lsq")))
    prepared.train()
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-3)
    for step in range(6):
        set_phase(prepared, fake_quant=step > 2, observers=True, batchnorm_frozen=False)
        prepared(*example.args).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    prepared.eval()
    converted = get_mode("fx").convert(cpu_copy(prepared), example)
    assert all(check.sqnr_db > 60 for check in converted.checks), converted.checks
    with torch.no_grad():
        rounded = prepared(*example.args)
        set_phase(prepared, fake_quant=False, observers=False, batchnorm_frozen=False)
        assert sqnr_db(prepared(*example.args), rounded) > 10


@pytest.mark.parametrize("stacked", [False, True], ids=["cat", "stack"])
@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_the_range_of_all_inputs_grows_with_them(mode: str, stacked: bool) -> None:
    """Observed after their rounding, they would stay within the range of the first batch."""
    prepared, example = prepare(SmallAndLarge(stacked), Recipe(mode, "x86" if mode == "pt2e" else EXACT), factor=5.0)
    prepared.eval()
    with torch.no_grad():
        rounded = prepared(*example.args)
        set_phase(prepared, fake_quant=False, observers=False, batchnorm_frozen=False)
        assert sqnr_db(prepared(*example.args), rounded) > 20


class Shuffled(nn.Module):
    """Half of the channels go through a ReLU and are concatenated with the other half, as in ShuffleNet."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, 1)
        if self.way == "both sides":
            right = right.relu()
        elif self.way == "another limit":
            right = F.relu6(right)
        return self.second(torch.cat([right, left.relu()], 1))


@pytest.mark.parametrize("way", ["one side", "both sides", "another limit"])
def test_a_relu_in_front_of_one_part_of_a_concatenation_is_not_lost(way: str) -> None:
    example = Example((torch.randn(4, 3, 8, 8),))
    prepared = get_mode("fx").prepare(Shuffled(way), example, Recipe("fx", EXACT))
    calibrate(prepared, [example])
    converted = get_mode("fx").convert(prepared.eval(), example)  # which compares int8 with fake-quant
    assert all(row.quantized for row in converted.coverage)
    assert converted.whole.sqnr_db > 50
