"""Coverage lists every layer once with its multiply-accumulates, in every mode and kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.recipes.folding import fuse
from qat_lightning.settings.recipe import Recipe
from tests.support.exactness import EXACT


class Convolution(nn.Conv3d):
    """A layer in a custom class, as in video networks."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs, 3, padding=1, bias=False)


class Scaled(nn.Linear):
    pass


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Convolution(3, 4), nn.BatchNorm3d(4), nn.ReLU())
        self.conv = nn.Conv3d(4, 4, (3, 1, 1))
        self.head, self.tail = Scaled(4, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.head(self.conv(self.stem(x)).amax((2, 3, 4))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class GraphLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.second(torch.matmul(adjacency, F.relu(self.first(x))))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.both, self.idle = nn.Linear(4, 8), nn.Bilinear(8, 8, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.both(x, x)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, int], int]] = {
    "video": (
        Video,
        (torch.randn(2, 3, 4, 4, 4),),
        {"stem.0": 64 * 27 * 12, "conv": 32 * 3 * 16, "head": 8, "tail": 4},
        0,
    ),
    "recurrent": (Recurrent, (torch.randn(2, 5, 4),), {"lstm": 5 * 2 * 32 * 12, "head": 32}, 0),
    "graph": (GraphLayers, (torch.randn(3, 6, 4), torch.rand(3, 6, 6)), {"first": 192, "second": 96}, 6 * 6 * 8),
    "bilinear": (Bilinear, (torch.randn(3, 4),), {"first": 32, "both": 128, "idle": 0}, 0),
}


def coverage(mode: str, kind: str, network: nn.Module, args: tuple[Any, ...]) -> list[LayerCoverage]:
    example, recipe = Example(args), Recipe(mode, "x86" if mode == "pt2e" else EXACT, kind=kind)
    if kind == "dynamic":
        converted = quantize(network, example, recipe)
    else:
        prepared = get_mode(mode).prepare(network, example, recipe).train()
        prepared(*args)
        beforehand = get_mode(mode).coverage(cpu_copy(prepared), example)
        converted = get_mode(mode).convert(cpu_copy(prepared), example)
        told = {row.name: (row.kind, row.macs) for row in beforehand}
        assert told == {row.name: (row.kind, row.macs) for row in [*converted.coverage, *converted.operations]}
    return [*converted.coverage, *converted.operations]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("mode", "kind"), [(m, k) for m in ("eager", "fx", "pt2e") for k in ("qat", "dynamic")])
def test_each_layer_once_with_what_it_multiplies(mode: str, kind: str, case: str) -> None:
    make, args, layers, between = CASES[case]
    rows = coverage(mode, kind, make(), args)
    assert {row.name: row.macs or 0 for row in rows if row.what == "layer"} == layers
    assert sum(row.macs or 0 for row in rows if row.what == "op") == between
    names = [row.name for row in rows]
    assert len(names) == len(set(names))
    assert {row.name for row in rows if row.reason.startswith("not used")} <= {"idle"}


def test_layers_by_classes_of_their_own_are_int8_in_fx() -> None:
    make, args, _, _ = CASES["video"]
    assert all(row.quantized for row in coverage("fx", "qat", make(), args) if row.what == "layer")


def test_what_is_inside_a_module_that_is_called_as_a_whole_is_said_to_be_there() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    example, earlier = Example((torch.randn(2, 3, 8),)), Recipe("fx", "x86", families=())
    prepared = get_mode("fx").prepare(network, example, earlier)
    rows = {row.name: row for row in get_mode("fx").coverage(cpu_copy(prepared), example)}
    assert rows["1.linear1"].reason.startswith("inside '1', which is called as a whole")
    assert rows["1"].macs is None, "what is inside has it"


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_fuse_folds_whatever_the_padding(padding_mode: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=padding_mode), nn.BatchNorm2d(4)).eval()
    network[1].running_mean += 1
    x = torch.randn(2, 3, 6, 6)
    fused, count = fuse(copy.deepcopy(network), x)
    assert count == 1
    torch.testing.assert_close(fused(x), network(x))
