"""Layers in the order of the network, with inputs of any sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.recipes.adaround import AdaRound, adaround
from qat_lightning.recipes.layers import rounded_layers
from qat_lightning.recipes.sequence import LayerUnit, units
from qat_lightning.recipes.sequential_mse import sequential_mse
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.recipes.test_blocks import Residual

MODES = ("eager", "fx")


class Tokens(nn.Module):
    """Linear layers on sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Signals(nn.Module):
    """Convolutions in one dimension, of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(8, 8, 3), nn.Conv1d(8, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


SIZES: dict[str, tuple[type[nn.Module], list[tuple[int, ...]]]] = {
    "lengths": (Tokens, [(2, 5, 8), (2, 7, 8), (3, 5, 8), (1, 40, 8)]),
    "signals": (Signals, [(4, 8, 9), (2, 8, 12), (4, 8, 9)]),
    "images": (Residual, [(4, 1, 8, 8), (2, 1, 12, 10), (4, 1, 8, 8)]),
    "unlike_counts": (Tokens, [(6, 8), (2, 3, 8), (2, 3, 2, 8)]),
}


def correlated(*shape: int) -> Tensor:
    """Noise whose values go together along each dimension, so that errors can cancel."""
    return torch.randn(shape) + 2 * torch.randn(shape[0], *[1] * (len(shape) - 1))


def prepare(mode: str, make: type[nn.Module], batches: list[Tensor], bits: int = 3) -> nn.Module:
    torch.manual_seed(0)
    recipe = Recipe(mode, "x86", Scheme(weight_bits=bits, weight_observer="mse"), kind="static")
    prepared = get_mode(mode).prepare(make().eval(), Example((batches[0],)), recipe)
    calibrate(prepared, batches)
    return prepared


def of_sizes(mode: str, name: str) -> tuple[nn.Module, list[Tensor]]:
    make, sizes = SIZES[name]
    torch.manual_seed(1)
    batches = [correlated(*size) for size in sizes]
    return prepare(mode, make, batches), batches


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_ranges_are_searched_on_batches_of_several_sizes(mode: str, name: str) -> None:
    prepared, batches = of_sizes(mode, name)
    results = sequential_mse(prepared, batches)
    assert set(results) == {layer.name for layer in rounded_layers(prepared)}
    assert all(result.after <= result.before for result in results.values())
    assert any(result.after < result.before for result in results.values())


@pytest.mark.parametrize("blocks", ["none", "auto"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_rounding_is_learned_on_batches_of_several_sizes(mode: str, name: str, blocks: Any) -> None:
    prepared, batches = of_sizes(mode, name)
    results = adaround(prepared, batches, AdaRound(150, batch_size=4, blocks=blocks))
    learned = {"stem", "blocks.0", "blocks.1", "head"} if blocks == "auto" and name == "images" else None
    assert set(results) == (learned or {layer.name for layer in rounded_layers(prepared)})
    assert all(result.learned <= result.nearest for result in results.values())
    assert any(result.learned < 0.9 * result.nearest for result in results.values())


def test_how_rows_are_divided_into_sequences_does_not_matter() -> None:
    """A linear layer treats each token alone, so the search finds the same whatever the lengths."""
    torch.manual_seed(2)
    rows = torch.randn(24, 8)
    found = []
    for batches in ([rows[:10].view(2, 5, 8), rows[10:].view(2, 7, 8)], [each.view(2, 4, 8) for each in rows.split(8)]):
        found.append(sequential_mse(prepare("eager", Tokens, batches), batches))
    for name, one in found[0].items():
        assert one.before == pytest.approx(found[1][name].before, rel=1e-4)
        assert one.after == pytest.approx(found[1][name].after, rel=1e-4)
        assert one.share == pytest.approx(found[1][name].share)


def first_unit(batches: list[Tensor]) -> LayerUnit:
    unit = next(units(prepare("eager", Tokens, batches), batches))
    assert isinstance(unit, LayerUnit)
    return unit


def test_samples_of_all_sizes_are_drawn_alike_each_with_its_target() -> None:
    torch.manual_seed(3)
    batches = [torch.randn(6, 5, 8), torch.randn(2, 7, 8), torch.randn(4, 5, 8)]
    unit, generator = first_unit(batches), torch.Generator().manual_seed(0)
    layer, drawn = unit.layers[0], {5: 0, 7: 0}
    for _ in range(300):
        inputs, targets = unit.draw(8, generator)
        assert sum(map(len, inputs)) == 8
        for x, target in zip(inputs, targets, strict=True):
            drawn[x.shape[1]] += len(x)
            torch.testing.assert_close(target, x @ layer.folded().T)
    assert drawn[7] / 2400 == pytest.approx(2 / 12, abs=0.03)
    weight = layer.rounded()
    everything = torch.cat([x.flatten(0, -2) for x in batches]).double()
    error, size = everything @ (weight - layer.folded()).double().T, everything @ layer.folded().double().T
    assert unit.error([weight]) == pytest.approx(float(error.square().sum() / size.square().sum()), rel=1e-4)
    inputs, targets = [batches[0], batches[1]], [batches[0] @ layer.folded().T, batches[1] @ layer.folded().T]
    by_token = torch.cat([x.flatten(0, -2) for x in inputs]) @ (weight - layer.folded()).T
    torch.testing.assert_close(unit.distance(unit.outputs(inputs, [weight]), targets), by_token.square().sum(-1).mean())


def test_samples_of_one_size_are_drawn_from_all_batches_as_one() -> None:
    torch.manual_seed(4)
    batches = [torch.randn(6, 5, 8), torch.randn(3, 5, 8)]
    unit = first_unit(batches)
    for samples in (4, 100):
        chosen = torch.randint(9, (min(samples, 9),), generator=torch.Generator().manual_seed(7))
        (drawn,), _ = unit.draw(samples, torch.Generator().manual_seed(7))
        assert torch.equal(drawn, torch.cat(batches)[chosen])
    assert len(list(unit.parts())) == 1


def test_batches_without_samples_teach_nothing() -> None:
    torch.manual_seed(5)
    full = [correlated(4, 5, 8), correlated(4, 5, 8)]
    results = []
    for batches in (full, [*full, torch.zeros(0, 9, 8), torch.zeros(0, 5, 8)]):
        prepared = prepare("eager", Tokens, full)
        results.append((sequential_mse(prepared, batches), adaround(prepared, batches, AdaRound(20))))
    assert results[0] == results[1]
    prepared = prepare("eager", Tokens, full)
    assert adaround(prepared, [torch.zeros(0, 9, 8)], AdaRound(20)) == {}
