"""Tensors that forward reads besides calling their layer, values of other types, and random numbers in evaluation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import calibrate
from qat_lightning.errors import NetworkError, VerificationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.judging import Names
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.whole import check_whole, is_right, raise_if_wrong
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe

IMAGES = Example((torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)


class ReadsWeight(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))) * self.a.weight.abs().mean())


class ReturnsPenalty(_Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(F.relu(self.norm(self.a(x)))), self.b.weight.pow(2).sum()


class ReadsNorm(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))) * self.norm.weight.view(1, -1, 1, 1))


class ReturnsNorm(_Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.norm(self.a(x))), self.norm.weight


class InDouble(_Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.a(x))).double()
        return self.b((y + y * 2.0).float())


class InBfloat(_Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).bfloat16()
        return self.b(F.relu(y + y).float())


class Draws(_Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.a(x)))
        return self.b(y + 0.5 * torch.rand_like(y))


class DropsAlways(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(F.relu(self.norm(self.a(x))), 0.3, training=True))


class Classes(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x)))).argmax(1)


def _convert(network: nn.Module, mode: str, example: Example = IMAGES) -> Converted:
    prepared = get_mode(mode).prepare(network, example, Recipe(mode, "x86"))
    calibrate(prepared, [example])
    return get_mode(mode).convert(cpu_copy(prepared), example)


@pytest.mark.parametrize(
    ("kind", "mode", "layers"),
    [
        (ReadsWeight, "eager", {"b"}),
        (ReadsWeight, "pt2e", {"a", "b"}),
        (ReturnsPenalty, "pt2e", {"a", "b"}),
        (ReadsNorm, "eager", {"a", "b"}),
        (ReturnsNorm, "eager", {"a", "b"}),
        (InDouble, "fx", {"a", "b"}),
        (InBfloat, "fx", {"a", "b"}),
        (Draws, "fx", {"a", "b"}),
        (Draws, "eager", {"a", "b"}),
        (DropsAlways, "fx", {"a", "b"}),
        (Classes, "fx", {"a", "b"}),
        (Classes, "eager", {"a", "b"}),
        (Classes, "pt2e", {"a", "b"}),
    ],
)
def test_layers_are_int8_and_the_whole_is_right(kind: type[nn.Module], mode: str, layers: set[str]) -> None:
    converted = _convert(kind(), mode)
    assert {row.name for row in converted.coverage if row.quantized} == layers
    assert converted.whole is not None
    assert is_right(converted.whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_networks_in_another_precision_convert(mode: str, dtype: torch.dtype) -> None:
    converted = _convert(ReadsNorm().to(dtype), mode, Example((IMAGES.args[0].to(dtype),)))
    assert sum(row.quantized for row in converted.coverage) == 2


def test_pt2e_refuses_networks_in_another_precision_with_a_remedy_that_works() -> None:
    with pytest.raises(NetworkError, match=r"network\.float\(\)"):
        _convert(Classes().double(), "pt2e", Example((IMAGES.args[0].double(),)))
    assert rehearse(Classes().double(), Example((IMAGES.args[0].double(),)), Recipe("pt2e", "x86")).int8_macs == 1.0


class TwoPrecisions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).double())


@pytest.mark.parametrize("mode", ["fx", "eager", "pt2e"])
def test_layers_of_several_precisions_are_refused_before_training(mode: str) -> None:
    with pytest.raises(NetworkError, match=r"'b' \(torch.float64\)"):
        get_mode(mode).prepare(TwoPrecisions(), Example((torch.randn(4, 6),)), Recipe(mode, "x86"))


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spare, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_eager_refuses_a_network_whose_only_layers_the_example_does_not_run() -> None:
    with pytest.raises(NetworkError, match="spare: the example does not call it"):
        get_mode("eager").prepare(Spare(), Example((torch.randn(4, 6),)), Recipe("eager", "x86"))


def test_integers_are_judged_by_how_many_differ() -> None:
    wanted = torch.arange(100)
    few, many = wanted.clone(), wanted.clone()
    few[:2] += 1
    many[:30] += 1
    row = check_whole(wanted, few, [])
    assert row is not None
    assert is_right(row)
    row = check_whole(wanted, many, [lambda disturb: wanted])
    assert row is not None
    assert not is_right(row)
    with pytest.raises(VerificationError, match=r"70\.0% equal values"):
        raise_if_wrong(row, [], [], Names())
    chaotic = check_whole(wanted, many, [lambda disturb: many])
    assert chaotic is not None
    assert is_right(chaotic)


def test_outputs_of_another_type_are_wrong() -> None:
    row = check_whole(torch.zeros(4), torch.zeros(4, dtype=torch.int64), [])
    assert row is not None
    assert not is_right(row)
