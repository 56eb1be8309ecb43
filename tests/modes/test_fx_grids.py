"""One shared grid in mode fx for values that int8 kernels keep on one grid, in any order of reading."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.shared_range import SharedRange
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from tests.support.exactness import EXACT


class Skips(nn.Module):
    """Three maps with different ranges, concatenated in one of the ways below."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.small = nn.Conv2d(3, 8, 1)
        self.pool, self.drop = nn.MaxPool2d(3, 1, 1), nn.Dropout(0.2)
        self.heads = nn.ModuleList(nn.Conv2d(count * 8, 4, 1) for count in range(1, 4))

    def head(self, *maps: Tensor, eights: int = 2) -> Tensor:
        return self.heads[eights - 1](torch.cat(maps, 1))

    def forward(self, image: Tensor) -> Tensor:
        skip, small = self.first(image), self.small(image)
        return getattr(self, self.way)(skip, small)

    def pool_then_join(self, skip: Tensor, small: Tensor) -> Tensor:
        return self.head(skip, self.second(self.pool(skip)))

    def pool_then_join_the_other_way(self, skip: Tensor, small: Tensor) -> Tensor:
        return self.head(self.second(self.pool(skip)), skip)

    def two_joins(self, skip: Tensor, small: Tensor) -> Tensor:
        pooled = self.heads[0](self.pool(skip))
        return pooled + self.head(small, skip) + self.head(self.second(skip), small)

    def join_of_joins(self, skip: Tensor, small: Tensor) -> Tensor:
        inner = torch.cat([self.second(self.pool(skip)), skip], 1)
        return self.head(small, inner, eights=3) + self.head(inner)

    def dropped_and_turned(self, skip: Tensor, small: Tensor) -> Tensor:
        return self.head(self.pool(small), self.drop(skip).permute(0, 1, 3, 2), skip, eights=3)

    def in_parts(self, skip: Tensor, small: Tensor) -> Tensor:
        first, second = skip.chunk(2, 1)
        return self.head(small, second, first) + self.heads[0](self.pool(skip))

    def added_too(self, skip: Tensor, small: Tensor) -> Tensor:
        return self.head(F.relu(small), skip) + self.heads[0](self.pool(skip) + small)


WAYS = (
    "pool_then_join",
    "pool_then_join_the_other_way",
    "two_joins",
    "join_of_joins",
    "dropped_and_turned",
    "in_parts",
    "added_too",
)


def trained(way: str) -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    example = Example((2 * torch.randn(4, 3, 8, 8),))
    prepared = get_mode("fx").prepare(Skips(way), example, Recipe("fx", EXACT))
    prepared.train()
    for size in range(1, 5):
        prepared(torch.randn(4, 3, 8, 8) * size)
    return prepared, example


@pytest.mark.parametrize("way", WAYS)
def test_int8_equals_fake_quant_as_a_whole(way: str) -> None:
    prepared, example = trained(way)
    converted = get_mode("fx").convert(cpu_copy(prepared), example)
    with torch.no_grad():
        assert sqnr_db(cpu_copy(prepared)(*example.args), converted.network(*example.args)) > 100


def test_a_checkpoint_with_a_range_of_its_own_behind_the_pool_loads() -> None:
    prepared, _ = trained("pool_then_join_the_other_way")
    (pooled,) = [node for node in prepared.graph.nodes if node.target == "pool"]
    (rounding,) = pooled.users
    assert isinstance(prepared.get_submodule(rounding.target), SharedRange)
    own = {"min_val": torch.tensor(0.0), "max_val": torch.tensor(1.0), "batches": torch.tensor(3)}
    before = {name: fq.max_val.clone() for name, fq in prepared.named_modules() if is_activation(fq)}
    prepared.load_state_dict(prepared.state_dict() | {f"{rounding.target}.{key}": value for key, value in own.items()})
    assert before == {name: fq.max_val for name, fq in prepared.named_modules() if is_activation(fq)}


def is_activation(module: nn.Module) -> bool:
    return isinstance(module, FakeQuantize) and module.observed
