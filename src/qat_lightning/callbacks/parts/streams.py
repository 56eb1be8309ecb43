"""Reading the first batch of a loader ahead, and putting it back if the loader yields each batch only once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from qat_lightning.errors import NetworkError


@dataclass
class FirstBatch:
    """The first batch of a stream.

    Attributes:
        batch: The batch; None for an empty stream.
        once: Whether the stream yields each batch only once, as determined by reading twice.
        loader: The loader to iterate instead, which begins with that batch; usually the stream itself.
    """

    batch: Any
    once: bool
    loader: Any


def is_stream(loader: Any) -> bool:
    """Whether the first batch of a loader cannot be made from a dataset, and has to be read from the loader."""
    return not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)


def first_batch(stream: Any, again: Callable[[], Any] | None = None) -> FirstBatch:
    """Read the first batch of a stream such that iteration still begins with it.

    If a second iteration begins with the same batch, the stream restarts and nothing needs to be put back. Otherwise
    the batches that were read are put in front of the rest, once.

    Args:
        stream: Any iterable.
        again: Returns the stream that will be iterated afterwards; the same one by default.

    Raises:
        NetworkError: The batches cannot be put back; the message says how to avoid reading ahead.
    """
    looked, kept = _look(stream)
    first = kept[0] if kept else None
    if looked is stream:
        return FirstBatch(first, True, chain(kept, looked))
    if not kept or getattr(stream, "num_workers", 0) > 0:
        return FirstBatch(first, False, stream)  # workers iterate copies
    later = stream if again is None else again()
    looked_again, kept_again = _look(later)
    if kept_again and _equal(first, kept_again[0]):
        return FirstBatch(first, False, later)
    if looked_again is later:
        return FirstBatch(first, True, chain(kept, kept_again, looked))
    # Two iterators over one underlying source: either may continue it.
    return FirstBatch(first, True, _begin_with(later, [*kept, *kept_again], looked))


def _look(stream: Any) -> tuple[Iterator[Any], list[Any]]:
    """Return an iterator and its first batch, if any; random states are restored, so that a second read is alike."""
    with isolate_rng(), generators_kept(stream):
        batches = iter(stream)
        return batches, list(islice(batches, 1))


@contextmanager
def generators_kept(loader: Any) -> Iterator[None]:
    """Restore the random generators of a loader and its samplers after the block."""
    owners = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
    owners += [getattr(owner, "sampler", None) for owner in owners]
    generators = [g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class _Replay:
    """Yields batches that were read ahead, until they are used up."""

    def __init__(self, rest: Iterable[Any]) -> None:
        self.kept: deque[Any] = deque()
        self.rest = rest

    def batches(self, loader: Any, cls: type) -> Iterator[Any]:
        # Lazily, because Lightning may request an iterator only to check that there is one.
        while self.kept:
            yield self.kept.popleft()
        loader.__class__ = cls
        yield from self.rest


def _begin_with(loader: Any, kept: list[Any], rest: Iterable[Any]) -> Any:
    replay: _Replay | None = getattr(type(loader), "_replay", None)
    if replay is None:
        cls, replay = type(loader), _Replay(rest)
        functions = {"__iter__": lambda self: replay.batches(self, cls), "_replay": replay}
        try:
            # Patch a subclass: iter() looks methods up on the class, and Lightning must still see a DataLoader.
            loader.__class__ = type(cls.__name__, (cls,), functions | {"__module__": cls.__module__})
        except TypeError as error:
            raise NetworkError(
                f"The loader ({cls.__name__}) yields each batch once, and the first cannot be put back: give "
                "example_inputs=, so that none is read."
            ) from error
    replay.kept.extendleft(reversed(kept))
    return loader


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and bool((left == right).all())
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    same = left == right
    return bool(same.all() if hasattr(same, "all") else same)
