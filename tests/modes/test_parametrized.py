"""Layers whose weight is computed from parameters: float with the reason in fx; an error in other modes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from qat_lightning.artifact import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.fx.mode import FxMode
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.pt2e import Pt2eMode
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
EXAMPLE = Example((IMAGES,))


class Normed(nn.Module):
    """A convolution with BatchNorm and a linear layer with a computed weight, each followed by a ReLU."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.conv, self.bn = norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)
        self.fc, self.head = norm(nn.Linear(8, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.head(F.relu(self.fc(x)))


class ReadElsewhere(nn.Module):
    """A computed weight that a function also reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(F.relu(self.fc(x)), self.fc.weight))


def train(prepared: nn.Module, inputs: Tensor) -> None:
    """Train for three steps."""
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(inputs).square().mean().backward()
        optimizer.step()


class CountsInTraining(nn.Module):
    """A parametrization that counts how often its weight was computed in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self.count.add_(1)
        return weight.clamp(-1, 1)


def counted(layer: nn.Module) -> nn.Module:
    return register_parametrization(layer, "weight", CountsInTraining())


@pytest.mark.parametrize("norm", [spectral_norm, counted])
@pytest.mark.parametrize("settings", [("fx", "qat"), ("eager", "qat"), ("fx", "weight_only"), ("eager", "dynamic")])
def test_preparation_leaves_the_state_of_parametrizations(
    norm: Callable[[nn.Module], nn.Module], settings: tuple[str, Any]
) -> None:
    mode, kind = settings
    network = Normed(norm).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    prepared = get_mode(mode).prepare(network, EXAMPLE, Recipe(mode, "x86", kind=kind))
    after = prepared.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("exclude", [(), ("conv", "fc")])
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm, orthogonal])
def test_they_train_and_stay_float_in_fx(
    norm: Callable[[nn.Module], nn.Module], exclude: tuple[str, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Normed(norm)
    keys, parameters = set(network.state_dict()), dict(network.named_parameters())
    recipe = Recipe("fx", "x86", exclude=exclude)
    prepared = FxMode().prepare(network, EXAMPLE, recipe)
    assert keys <= set(prepared.state_dict())
    assert all(prepared.get_parameter(name) is parameter for name, parameter in parameters.items())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    train(prepared, IMAGES)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in parameters.items() if "original" in name)
    expected = cpu_copy(prepared)(IMAGES)
    converted = FxMode().convert(cpu_copy(prepared), EXAMPLE)
    rows = {row.name: row for row in converted.coverage}
    assert rows["head"].quantized
    for name in ("conv", "fc"):
        assert not rows[name].quantized
        assert "excluded" if exclude else "remove_parametrizations" in rows[name].reason
    torch.testing.assert_close(converted.network(IMAGES), expected, atol=1e-3, rtol=1e-3)
    # What was prepared keeps its parametrizations, and the int8 network is in a file without any.
    assert is_parametrized(prepared.get_submodule("conv"))
    prepared(IMAGES)
    QuantizedNetwork(converted, recipe, EXAMPLE).save(tmp_path / "normed.int8")
    assert torch.equal(load_quantized(tmp_path / "normed.int8")(IMAGES), converted.network(IMAGES))


def test_a_computed_weight_that_a_function_reads_too() -> None:
    torch.manual_seed(0)
    example = Example((torch.randn(8, 6),))
    prepared = FxMode().prepare(ReadElsewhere(), example, Recipe("fx", "x86"))
    train(prepared, example.args[0])
    converted = FxMode().convert(cpu_copy(prepared), example)
    torch.testing.assert_close(converted.network(*example.args), cpu_copy(prepared)(*example.args))


@pytest.mark.parametrize("kind", ["qat", "static"])
def test_pt2e_refuses_spectral_norm_with_the_layers_and_a_mode_that_works(kind: str) -> None:
    with pytest.raises(TraceError) as caught:
        Pt2eMode().prepare(Normed(spectral_norm), EXAMPLE, Recipe("pt2e", "x86", kind=kind))  # type: ignore[arg-type]
    message = str(caught.value)
    for part in ("'conv', 'fc'", "spectral_norm", "mode='fx'", "remove_parametrizations"):
        assert part in message
    get_mode("eager").prepare(Normed(spectral_norm), EXAMPLE, Recipe("eager", "x86"))
