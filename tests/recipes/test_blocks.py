"""Learning the rounding of a block's layers together: blocks found or named, and the gain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import PostTrainingQuantization, Scheme
from qat_lightning.demos import ResNet20, SmallViT
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, prepared_state
from qat_lightning.modes.registry import get_mode
from qat_lightning.recipes.adaround import AdaRound, adaround
from qat_lightning.recipes.blocks import blocks_of, found_blocks
from qat_lightning.recipes.layers import rounded_layers
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import Lit, dataset, trainer
from tests.callbacks.test_recipes import WithTraining
from tests.recipes.test_bias_correction import MODES

IMAGES = dataset()[:32][0]


class Block(nn.Module):
    """A residual block whose first operation works in place on its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(x)
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(y))))) + y


class Residual(nn.Module):
    """A stem, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Twice(Residual):
    """The same block called twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.blocks(self.stem(x))).mean((2, 3)))


def prepare(mode: str, network: nn.Module | None = None, prefix: str = "") -> tuple[nn.Module, list[Example]]:
    torch.manual_seed(0)
    network = network or Residual()
    for _ in range(3):  # statistics of BatchNorm
        network(torch.randn(16, 1, 8, 8))
    batches = [Example((torch.randn(8, 1, 8, 8),)) for _ in range(3)]
    recipe = Recipe(mode, "x86", Scheme(weight_bits=3), kind="static")
    prepared = get_mode(mode).prepare(network.eval(), batches[0], recipe, prefix=prefix)
    calibrate(prepared, batches)
    return prepared, batches


def distance(prepared: nn.Module, batches: list[Example]) -> float:
    """The error of the network with rounded weights, and all else float, relative to the float network."""
    from qat_lightning.recipes.sequence import float_copy, use

    plain = prepared_state(prepared).float_network.eval()
    rounded = float_copy(prepared)
    for layer in rounded_layers(prepared):
        use(rounded.get_submodule(layer.name), layer)
    with torch.no_grad():
        return sum(float((rounded(*b.args) - plain(*b.args)).square().sum()) for b in batches)


def test_blocks_are_those_that_structure_shows() -> None:
    assert found_blocks(Residual()) == ("blocks.0", "blocks.1")
    resnet = found_blocks(ResNet20(num_classes=10))
    assert len(resnet) == 9
    assert len(found_blocks(SmallViT(num_classes=4, in_channels=1))) == 4
    assert found_blocks(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))) == ()


@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_every_mode_come_nearer_stay_on_the_grid_and_convert(mode: str) -> None:
    prepared, batches = prepare(mode)
    grids = {layer.name: layer.rounded() for layer in rounded_layers(prepared)}
    scales = {
        layer.name: layer.fq.calculate_qparams()[0].reshape(-1, *[1] * (grids[layer.name].dim() - 1))
        for layer in rounded_layers(prepared)
    }
    before = distance(prepared, batches)
    seen: list[tuple[int, int, str]] = []
    results = adaround(
        prepared, batches, AdaRound(200, blocks="auto"), progress=lambda n, of, name, _: seen.append((n, of, name))
    )
    assert seen == [(1, 4, "stem"), (2, 4, "blocks.0"), (3, 4, "blocks.1"), (4, 4, "head")]
    assert list(results) == [name for *_, name in seen]
    assert all(result.learned <= result.nearest for result in results.values())
    assert results["blocks.0"].learned < 0.9 * results["blocks.0"].nearest
    assert distance(prepared, batches) < before
    for layer in rounded_layers(prepared):
        moved = (layer.rounded() - grids[layer.name]).abs() / scales[layer.name]
        assert (moved <= 1.001).all(), "up or down, and no further"
    expected = {layer.name: layer.rounded() for layer in rounded_layers(prepared)}
    with torch.no_grad():
        wanted = prepared(*batches[0].args)
        got = get_mode(mode).convert(cpu_copy(prepared), batches[0]).network(*batches[0].args)
    assert float((wanted - got).norm() / wanted.norm()) < 0.1
    assert all(torch.equal(layer.rounded(), expected[layer.name]) for layer in rounded_layers(prepared))


def test_it_is_the_same_each_time_and_takes_names_of_the_lightning_module() -> None:
    first, batches = prepare("fx", prefix="net")
    second, _ = prepare("fx", prefix="net")
    settings = AdaRound(50, blocks=["net.blocks.1"])
    assert adaround(first, batches, settings) == adaround(second, batches, settings)
    for one, other in zip(rounded_layers(first), rounded_layers(second), strict=True):
        assert torch.equal(one.rounded(), other.rounded())


def test_a_block_that_is_called_twice_is_learned_by_layers_and_refused_by_name() -> None:
    network, x = Twice().eval(), torch.randn(2, 1, 8, 8)
    assert blocks_of(network, x, "auto") == ()
    with pytest.raises(ConfigurationError, match=r"'blocks\.0' is called 2 times in one call"):
        blocks_of(network, x, ["blocks.0"])


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["net.block"], r"'net\.block' is no submodule.*'net\.blocks\.0', 'net\.blocks\.1'"),
        (["net.blocks", "net.blocks.0"], r"'net\.blocks\.0' is inside 'net\.blocks'"),
        (["net.blocks.0.bn1"], r"'net\.blocks\.0\.bn1' holds no convolution"),
    ],
)
def test_names_that_are_no_blocks_are_refused_with_those_that_are(names: list[str], what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        blocks_of(Residual().eval(), torch.randn(2, 1, 8, 8), names, "net")


def test_a_wrong_name_stops_a_fit_before_its_first_step() -> None:
    for name, what in (("net.nothing", "is no submodule"), ("other.blocks", "begin with 'net.'")):
        ptq = PostTrainingQuantization(adaround=AdaRound(iterations=5, blocks=[name]), calibration_batches=1)
        fitting, module = trainer(ptq), Lit(Residual())
        with pytest.raises(ConfigurationError, match=what):
            fitting.fit(module, WithTraining(module).train_dataloader())
        assert fitting.global_step == 0


@pytest.mark.parametrize("blocks", ["some", [], [1], 3])
def test_what_is_no_setting_of_blocks_is_refused(blocks: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"adaround\.blocks="):
        AdaRound(blocks=blocks)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_post_training_quantization_learns_by_blocks(mode: str) -> None:
    torch.manual_seed(0)
    module = Lit(Residual()).eval()
    reference = module.net(IMAGES).detach()
    errors = {}
    for blocks in (None, "auto", ["net.blocks"]):
        settings = None if blocks is None else AdaRound(iterations=200, blocks=blocks)
        callback = PostTrainingQuantization(mode, scheme=Scheme(weight_bits=3), adaround=settings)
        trainer(callback).test(WithTraining(module), verbose=False)
        outputs = callback.prepared.eval()(IMAGES).detach()
        errors[str(blocks)] = float((outputs - reference).norm() / reference.norm())
    assert errors["auto"] < errors["None"]
    assert errors["['net.blocks']"] < errors["None"]
