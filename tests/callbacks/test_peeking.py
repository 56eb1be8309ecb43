"""Reading one batch ahead: loaders keep their position, streams get their batch back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from qat_lightning.callbacks.parts.peeking import Look

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def look(loaders: Any) -> Look:
    return Look(_DataLoaderSource(loaders, "train_dataloader"), "train_dataloader")


class Keyed(TensorDataset):
    """A dataset that accepts only the keys of its sampler."""

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            raise KeyError(key)
        return self.tensors[0][int(key)]


def loaders() -> list[DataLoader[Any]]:
    data = TensorDataset(torch.arange(64.0))
    generator = torch.Generator().manual_seed(0)
    return [
        DataLoader(data, batch_size=8, shuffle=True, generator=generator),
        DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=generator), 8, True)),
        DataLoader(data, batch_size=None, shuffle=True, generator=generator),
        DataLoader(Keyed(torch.arange(64.0)), batch_size=8, sampler=[str(n) for n in range(64)]),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("kind", range(4))
def test_a_peek_does_not_move_a_loader(kind: int) -> None:
    peeked, plain = loaders()[kind], loaders()[kind]
    assert look(peeked).all_batches() is not None
    torch.manual_seed(0)
    after = list(peeked)
    torch.manual_seed(0)
    expected = list(plain)
    for left, right in zip(after, expected, strict=True):
        left, right = (left, right) if isinstance(left, Tensor) else (left[0], right[0])
        assert torch.equal(left, right)


def test_a_peek_is_spread_over_sorted_data() -> None:
    (batch,) = look(DataLoader(TensorDataset(torch.arange(64.0)), batch_size=4)).all_batches()
    assert batch.tolist() == [0.0, 16.0, 32.0, 48.0]


def test_a_collection_of_loaders_gives_a_collection_of_batches() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(TensorDataset(X), batch_size=2)

    assert [len(batch[0]) for batch in look([make(), make()]).all_batches()] == [2, 2]
    assert set(look(CombinedLoader({"a": make(), "b": make()}, "min_size")).all_batches()) == {"a", "b"}
    assert len(look(CombinedLoader([make(), make()], "sequential")).all_batches()) == 1
    assert look(None).all_batches() is None


class Stream(IterableDataset[Tensor]):
    """Numbers, each once in total, however often it is iterated."""

    def __init__(self) -> None:
        self.source = iter(torch.arange(6.0))

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.source


class Again(Stream):
    """The numbers, from the beginning each time."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(6.0)


class Plain:
    """Not a DataLoader; a new iterator each time, over one source."""

    def __init__(self) -> None:
        self.source = iter(torch.arange(6.0))

    def __iter__(self) -> Iterator[Tensor]:
        return map(torch.clone, self.source)


STREAMS = {
    "dataset, once": lambda: DataLoader(Stream(), batch_size=2),
    "dataset, anew": lambda: DataLoader(Again(), batch_size=2),
    "iterable": lambda: Plain(),
    "generator": lambda: (number for number in torch.arange(6.0)),
    "two of them": lambda: {"one": DataLoader(Stream(), batch_size=2), "other": Plain()},
    "combined": lambda: CombinedLoader([DataLoader(Stream(), batch_size=2)], "max_size"),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_keeps_its_first_batch(kind: str) -> None:
    """Also after reading ahead twice, and after requesting an unused iterator."""
    source = _DataLoaderSource(STREAMS[kind](), "train_dataloader")
    found = []
    for _ in range(2):
        looked = Look(source, "train_dataloader")
        found.append(looked.all_batches())
        looked.give_back()
        assert looked.once == (kind != "dataset, anew")
    loaders = source.instance.iterables if isinstance(source.instance, CombinedLoader) else source.instance
    parts = loaders.values() if isinstance(loaders, dict) else loaders if isinstance(loaders, list) else [loaders]
    for part in parts:
        iter(part)
        assert torch.cat([batch.flatten() for batch in part]).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert str(found[0]) == str(found[1])


@pytest.mark.parametrize("shared", [True, False])
def test_a_module_that_makes_loaders_of_one_stream(shared: bool) -> None:
    """The batch is put back only into the next loader."""

    class Making(LightningModule):
        made = 0
        stream = Stream()

        def train_dataloader(self) -> Any:
            self.made += 1
            return DataLoader(self.stream if shared else Stream(), batch_size=2)

    module = Making()
    looked = Look(_DataLoaderSource(module, "train_dataloader"), "train_dataloader")
    assert looked.all_batches().tolist() == [0.0, 1.0]
    looked.give_back()
    assert looked.once == shared
    assert torch.cat(list(module.train_dataloader())).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    module.train_dataloader()
    assert module.made == (3 if shared else 4)
    assert "train_dataloader" not in vars(module)
