"""Loaders that continue in the middle of an epoch exactly where a checkpoint left them.

The order of an epoch is a pure function of (seed, epoch), and the place in it is part of the loader's state. Lightning
stores that state in the checkpoint and gives it back before the first batch of the resumed run.
"""

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from qat_lightning.demos.extras import require


class EpochSampler(DistributedSampler[Any]):
    """The indices of a data set, in an order that depends on the seed and the epoch only.

    It is a `DistributedSampler` also for a single process, so that Lightning sets its epoch and leaves it in place when
    several processes share the data.

    Args:
        dataset: The dataset to sample from; only its length matters.
        seed: Two samplers with one seed give the same order in the same epoch.
        num_replicas: How many processes share the data.
        rank: Which of them this one is.
        samples_per_epoch: How many of this process's indices an epoch uses, where the Trainer stops it earlier
            (`limit_train_batches`). A state saved there belongs to the next epoch.

    Example:
        >>> sampler = EpochSampler(range(6), seed=1)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> sorted(first) == sorted(sampler), first == list(sampler)
        (True, False)
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        samples_per_epoch: int | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.samples_per_epoch = samples_per_epoch

    def __iter__(self) -> "_EpochIterator":
        return _EpochIterator(self)

    def order(self, epoch: int) -> list[int]:
        """The indices of one epoch, of this process."""
        before, self.epoch = self.epoch, epoch
        try:
            return list(super().__iter__())
        finally:
            self.epoch = before


class _EpochIterator(Iterator[int]):
    """Walks through one epoch, and can say, and be told, which epoch it is and how far it got."""

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler
        self._begin(sampler.epoch)

    def __iter__(self) -> "_EpochIterator":
        return self

    def __next__(self) -> int:
        if self._yielded == len(self._order):
            raise StopIteration
        self._yielded += 1
        return self._order[self._yielded - 1]

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = self._sampler.order(epoch)
        self._yielded = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "yielded": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        end = min(len(self._order), self._sampler.samples_per_epoch or len(self._order))
        if state["yielded"] >= end:  # saved at the very end of an epoch: what comes next is a new one
            self._begin(state["epoch"] + 1)
        else:
            self._begin(state["epoch"])
            self._yielded = state["yielded"]


def resumable_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    num_workers: int = 0,
    num_replicas: int = 1,
    rank: int = 0,
    epoch: int = 0,
    batches_per_epoch: int | None = None,
    pin_memory: bool = False,
    collate_fn: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """A torchdata `StatefulDataLoader` that is reproducible and resumes exactly.

    Args:
        dataset: A map-style data set.
        batch_size: Samples in a batch, of each process.
        seed: Of the order and of the workers.
        shuffle: A new order each epoch (training), or always the data's own (evaluation).
        num_workers: Processes that load ahead; 0 loads in the training process.
        num_replicas: How many processes share a shuffled data set. Unshuffled ones are left to Lightning.
        rank: Which of them this one is.
        epoch: The epoch that comes first. A fit resumed at the end of an epoch makes its iterator, and with workers
            begins to load, before Lightning sets the sampler's epoch.
        batches_per_epoch: Where the Trainer ends an epoch, if before the end of the data.
        pin_memory: Copy batches to page-locked memory, for a GPU.
        collate_fn: Makes a batch of a list of samples; torch's default if not given.

    Returns:
        The loader.

    Raises:
        MissingExtraError: torchdata is not installed.
    """
    stateful = require("torchdata.stateful_dataloader", needed_for="A loader that resumes in the middle of an epoch")
    sampler = None
    if shuffle:
        sampler = EpochSampler(
            dataset,  # type: ignore[arg-type]
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
            samples_per_epoch=batches_per_epoch and batches_per_epoch * batch_size,
        )
        sampler.set_epoch(epoch)
    # Without a generator of its own, each loader would draw from the global one, and so change the model's dropout.
    generator = torch.Generator().manual_seed(seed)
    loader: DataLoader[Any] = stateful.StatefulDataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        collate_fn=collate_fn,
        generator=generator,
    )
    return loader
