"""Loaders that resume within an epoch exactly where a checkpoint was saved.

The order of an epoch is a pure function of (seed, epoch), and the position in it is part of the loader's state.
Lightning stores that state in the checkpoint and restores it before the first batch of the resumed run.
"""

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from qat_lightning.demos.extras import require


class EpochSampler(DistributedSampler[Any]):
    """Samples the indices of a dataset in an order that depends only on seed and epoch.

    It is a `DistributedSampler` even for a single process, so that Lightning sets its epoch and does not replace it
    with several processes.

    Args:
        dataset: The dataset to sample from; only its length matters.
        seed: Samplers with the same seed give the same order in the same epoch.
        num_replicas: Number of processes that share the data.
        rank: Index of this process.
        samples_per_epoch: Number of this process's indices per epoch, if the Trainer ends epochs early
            (`limit_train_batches`). A state saved at that point belongs to the next epoch.

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
        """Return this process's indices for one epoch."""
        before, self.epoch = self.epoch, epoch
        try:
            return list(super().__iter__())
        finally:
            self.epoch = before


class _EpochIterator(Iterator[int]):
    """Iterates over one epoch; its state is the epoch and the position in it."""

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
        if state["yielded"] >= end:  # saved at the end of an epoch: continue with the next one
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
    """Return a torchdata `StatefulDataLoader` that is reproducible and resumes exactly.

    Args:
        dataset: A map-style dataset.
        batch_size: Batch size per process.
        seed: Seed of the order and of the workers.
        shuffle: Whether to use a new order each epoch (training), or the dataset's own (evaluation).
        num_workers: Number of processes that prefetch data; 0 loads in the training process.
        num_replicas: Number of processes that share a shuffled dataset. Others are left to Lightning.
        rank: Index of this process.
        epoch: The first epoch. A fit resumed at the end of an epoch creates its iterator, and with workers begins to
            load, before Lightning sets the sampler's epoch.
        batches_per_epoch: Number of batches after which the Trainer ends an epoch, if before the end of the data.
        pin_memory: Copy batches to page-locked memory, for a GPU.
        collate_fn: Collate function; by default torch's.

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
    # Without its own generator, a loader would use the global one and so affect dropout in the model.
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
