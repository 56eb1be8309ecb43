"""Streams that yield each batch once, in a real Trainer: no batch is lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tests.callbacks.lit import Lit, dataset, loader, qat, trainer


class Once(IterableDataset[Any]):
    """The samples of a dataset, each once."""

    def __init__(self) -> None:
        self.samples = iter(dataset())

    def __iter__(self) -> Iterator[Any]:
        yield from self.samples


class Module(LightningDataModule):
    """Creates another loader of the same stream each time."""

    def __init__(self) -> None:
        super().__init__()
        self.once = Once()

    def train_dataloader(self) -> Any:
        return DataLoader(self.once, batch_size=16)


class Counts(Lit):
    """Records the first pixel of its training data."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[Tensor] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append(batch[0][:, 0, 0, 0].clone())


@pytest.mark.parametrize("kind", ["DataLoader", "generator", "module"])
def test_every_batch_is_trained_on(kind: str) -> None:
    module, callback = Counts(), qat("eager")
    streams = {"DataLoader": DataLoader(Once(), batch_size=16), "generator": (batch for batch in loader())}
    fitting = trainer(callback, max_epochs=1)
    if kind == "module":
        fitting.fit(module, datamodule=Module())
    else:
        fitting.fit(module, streams[kind])
    assert torch.equal(torch.cat(module.trained), dataset()[:][0][:, 0, 0, 0])
    assert callback.quantized is not None


def test_every_batch_is_predicted() -> None:
    module, callback = Lit(), qat("eager")
    trainer(callback, max_epochs=1).fit(module, loader())
    again = trainer(qat("eager"))
    assert sum(map(len, again.predict(module, DataLoader(Once(), batch_size=16)))) == 64
