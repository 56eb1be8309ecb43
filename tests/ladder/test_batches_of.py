"""The number of batches of an epoch, compared with Lightning's iteration over it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from qat_lightning.ladder.pieces import batches_of


def loader(count: int) -> DataLoader[int]:
    return DataLoader(range(count), batch_size=2)  # type: ignore[arg-type]


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


COLLECTIONS: list[Any] = [
    loader(6),
    [loader(6), loader(3)],
    {"a": loader(2), "b": [loader(6), loader(9)]},
    (loader(5),),
    *(CombinedLoader({"a": loader(6), "b": loader(3)}, mode) for mode in ("min_size", "max_size", "max_size_cycle")),
    CombinedLoader([loader(6), loader(3)], "sequential"),
]


@pytest.mark.parametrize("mode", ["max_size_cycle", "sequential"])
@pytest.mark.parametrize("number", range(len(COLLECTIONS)))
def test_it_is_that_of_the_iteration(number: int, mode: Any) -> None:
    loaders = COLLECTIONS[number]
    count = batches_of(loaders, mode)
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, mode)
    assert count == len(list(combined))


def test_a_loader_without_a_length_makes_it_infinite_where_it_decides() -> None:
    endless: DataLoader[int] = DataLoader(Endless())
    assert batches_of([loader(4), endless], "sequential") == math.inf
    assert batches_of([loader(4), endless], "max_size_cycle") == math.inf
    assert batches_of(CombinedLoader([loader(4), endless], "min_size"), "sequential") == 2
    assert batches_of([], "sequential") == 0
