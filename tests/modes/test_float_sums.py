"""Sums that only float ops read, in modes fx and pt2e: masks of attention, and inputs of normalizations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe

RECIPE = Recipe("fx", "x86")
LEAST = torch.finfo(torch.float32).min


class Attention(nn.Module):
    """Scores with a bias and a mask, written in many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(8, 8))
        nn.init.normal_(self.query.weight)
        nn.init.normal_(self.key.weight)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1) / 4
        if self.way == "where":
            scores = torch.where(there[:, None].bool(), scores, torch.full_like(scores, LEAST))
            return torch.softmax(scores, -1) @ self.value(x)
        mask = (1.0 - there[:, None].to(x.dtype)) * LEAST
        if self.way == "added":
            scores = scores + mask
        elif self.way == "in place":
            scores += mask
        else:
            scores = (scores + self.bias).view(-1, 8, 8) + mask
        return torch.softmax(scores, -1) @ self.value(x)


class PostNorm(nn.Module):
    """A residual addition that only a LayerNorm reads, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(x + self.block(x)))


def converted(network: nn.Module, example: Example, recipe: Recipe = RECIPE) -> tuple[nn.Module, Any]:
    mode = get_mode(recipe.mode)
    prepared = mode.prepare(network, example, recipe)
    calibrate(prepared, [example])
    prepared.eval()
    predicted = mode.coverage(prepared, example)
    result = mode.convert(prepared, example)
    rows = [*result.coverage, *result.operations]
    assert {(row.name, row.quantized) for row in predicted} == {(row.name, row.quantized) for row in rows}
    return result.network, rows


@pytest.mark.parametrize("pair", [("fx", "x86"), ("fx", "qnnpack"), ("pt2e", "x86"), ("pt2e", "xnnpack")])
@pytest.mark.parametrize("way", ["added", "in place", "twice", "where"])
def test_a_mask_leaves_the_scores_their_range(way: str, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    there = (torch.arange(8)[None] < torch.tensor([[8], [5], [3]])).long()
    example = Example((torch.randn(3, 8, 16), there))
    network = Attention(way).eval()
    int8, rows = converted(network, example, Recipe(*pair))
    assert sqnr_db(network(*example.args), int8(*example.args)) > 20
    assert all(row.quantized for row in rows if row.kind == "Linear")


def additions(rows: Any) -> list[str]:
    return [row.reason for row in rows if row.kind == "add"]


def test_what_only_a_normalization_reads_is_not_rounded() -> None:
    example = Example((torch.randn(4, 16),))
    _, rows = converted(PostNorm(), example)
    assert additions(rows) == ["only float ops read it"]
    assert all(row.quantized for row in rows if row.kind == "Linear")


def test_a_checkpoint_of_an_earlier_release_goes_on_with_its_roundings() -> None:
    earlier = replace(RECIPE, families=tuple(name for name in RECIPE.families if name != "sums"))
    example = Example((torch.randn(4, 16),))
    network = PostNorm().eval()
    now, before = (get_mode("fx").prepare(network, example, recipe).state_dict() for recipe in (RECIPE, earlier))
    assert now.keys() == before.keys()
    assert additions(converted(network, example, earlier)[1]) == [""]


class MovedNorm(nn.Module):
    """A residual addition that a channels-last LayerNorm reads, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.down = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.down(self.norm((x + self.block(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_a_sum_that_is_moved_before_a_float_op_lacks_no_range() -> None:
    mode, example = get_mode("fx"), Example((torch.randn(4, 3, 8, 8),))
    prepared = mode.prepare(MovedNorm(), example, RECIPE)
    calibrate(prepared, [example])
    converted = mode.convert(prepared, example)
    assert not converted.notes
    assert all(row.quantized for row in converted.coverage)
    assert {row.kind: row.reason for row in converted.operations if not row.quantized} == {
        "add": "only float ops read it",
        "LayerNorm": "LayerNorm is not quantized in mode='fx'",
    }
