"""When ranges are updated: with the training of the whole network, and once per forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qat_lightning import QuantizationAwareTraining
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import fake_quantizers, in_training_step
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.callbacks.lit import trainer

MODES = ("eager", "fx", "pt2e")


pytestmark = pytest.mark.usefixtures("without_compiler")


class Transfer(nn.Module):
    """A backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


class Levels(nn.Module):
    """One layer for inputs of several sizes, like a detector's head."""

    def __init__(self, factors: tuple[float, ...] = (3.0, 1.0, 0.3)) -> None:
        super().__init__()
        self.head, self.factors = nn.Linear(4, 4), factors

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(x * factor) for factor in self.factors]


def ranges(network: nn.Module) -> dict[str, tuple[float, float, int]]:
    return {
        name: (float(fq.min_val), float(fq.max_val), int(fq.batches))
        for name, fq in fake_quantizers(network)
        if fq.observed
    }


def prepare(network: nn.Module, x: Tensor, mode: str, scheme: Scheme | None = None) -> nn.Module:
    recipe = Recipe(mode, "x86") if scheme is None else Recipe(mode, "x86", scheme=scheme)
    return get_mode(mode).prepare(network, Example((x,)), recipe).train()


@pytest.mark.parametrize("mode", MODES)
def test_ranges_move_while_the_network_trains_and_not_in_validation(mode: str) -> None:
    x = torch.randn(2, 3, 6, 6)
    network = prepare(Transfer(), x, mode)
    network.get_submodule("backbone").eval()
    network(x)
    seen = ranges(network)
    assert all(batches == 1 for _, _, batches in seen.values() if batches)
    assert sum(batches for _, _, batches in seen.values()) >= 2
    network.eval()
    network(3 * x)
    assert ranges(network) == seen, "validation"
    in_training_step(network, True)
    copied = copy.deepcopy(network)
    network(3 * x)
    assert ranges(network) != seen, "a training step of a network that is kept in evaluation as a whole"
    copied(3 * x)
    assert ranges(copied) == seen, "a copy is nobody's training step"
    in_training_step(network, False)
    after = ranges(network)
    network(9 * x)
    assert ranges(network) == after


class KeptInEval(LightningModule):
    """Sets the network, or a part, to evaluation mode in every training step, and validates on larger values."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.net, self.part = Transfer(), part
        self.before_validation: dict[str, tuple[float, float, int]] = {}

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        self.get_submodule(self.part).eval()
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, _: int) -> None:
        before = ranges(self.net)
        self.net(100 * batch)
        assert ranges(self.net) == before

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.parametrize("part", ["net.backbone", "net"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_in_evaluation_becomes_int8(mode: str, part: str) -> None:
    callback, model = QuantizationAwareTraining(mode), KeptInEval(part)
    data = DataLoader([torch.randn(2, 3, 6, 6) for _ in range(3)], batch_size=None)
    trainer(callback, max_epochs=2).fit(model, data, data)
    assert all(row.quantized for row in callback.quantized.coverage)
    assert all(batches == 6 for _, _, batches in ranges(model.net).values() if batches)


MANY = (3.0, *[1.0] * 7, 0.3)
"""More calls than have grids of their own."""


def test_a_layer_called_many_times_moves_its_range_once_a_forward_pass() -> None:
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    network = prepare(Levels(MANY), x, "eager")
    grid: FakeQuantize = network.get_submodule("head.input_fake_quant")  # type: ignore[assignment]
    network(x)
    assert (float(grid.min_val), float(grid.max_val), int(grid.batches)) == (-3.0, 3.0, 1)
    network(2 * x)
    assert float(grid.max_val) == pytest.approx(3 + 9 / 11 * 3)
    assert int(grid.batches) == 2
    network(torch.full_like(x, torch.nan))
    assert int(grid.batches) == 2
    head = network.get_submodule("head")
    head(x)
    head(x)
    assert int(grid.batches) == 4, "a part that is called from outside has no forward pass around it"


def test_a_layer_called_once_has_the_ranges_of_a_moving_average() -> None:
    torch.manual_seed(0)
    network = prepare(Levels((1.0,)), torch.randn(2, 4), "eager")
    grid: FakeQuantize = network.get_submodule("head.input_fake_quant")  # type: ignore[assignment]
    alone = copy.deepcopy(grid)
    alone.__dict__["course"] = None
    for _ in range(4):
        x = torch.randn(2, 4)
        network(x)
        alone(x)
    assert torch.equal(grid.min_val, alone.min_val)
    assert torch.equal(grid.max_val, alone.max_val)
    assert torch.equal(grid.batches, alone.batches)


def test_learned_scales_begin_at_the_range_of_a_whole_forward_pass() -> None:
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    network = prepare(Levels(MANY[::-1]), x, "eager", Scheme(learned_step="lsq"))
    grid: FakeQuantize = network.get_submodule("head.input_fake_quant")  # type: ignore[assignment]
    network(x)
    network(x)
    assert grid.learns
    low, high = grid.range()
    assert float(high - low) == pytest.approx(6, abs=0.1)


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    class Raises(Levels):
        def forward(self, x: Tensor) -> list[Tensor]:
            outputs = super().forward(x)
            if x.sum() > 100:
                raise RuntimeError("too large")
            return [F.relu(output) for output in outputs]

    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    network = prepare(Raises(MANY), x, "eager")
    with pytest.raises(RuntimeError, match="too large"):
        network(x + 100)
    network.get_submodule("head")(x)
    assert int(network.get_submodule("head.input_fake_quant").batches) == 2
