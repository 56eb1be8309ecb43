"""Reading one batch before a Trainer's loop does, without consuming it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.data import DataLoader

from qat_lightning.callbacks.parts.precision import in_precision
from qat_lightning.callbacks.parts.streams import first_batch, generators_kept, is_stream
from qat_lightning.graph.example import MAX_BATCH

_LOADER_OF_STAGE = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


def one_batch(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> tuple[Any, bool]:
    """Return one batch of a stage, on the LightningModule's device, without consuming it.

    Args:
        trainer: Provides the loaders.
        pl_module: Its hooks, or its LightningDataModule's, transfer the batch.
        stage: ``"fit"``, ``"validate"`` (in a fit: its validation), ``"test"`` or ``"predict"``.

    Returns:
        The batch (None if there is none), and whether it comes from a stream that yields each batch only once.
    """
    loops: dict[str, Any] = {
        "fit": trainer.fit_loop,
        "validate": trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == "fit" else trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    look = Look(loops[stage]._data_source, _LOADER_OF_STAGE[stage])
    batch = look.all_batches() if stage == "fit" else look.batch_of_first()
    look.give_back()
    if batch is None:
        return None, look.once
    return transferred(trainer, pl_module, batch), look.once


def transferred(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int = 0) -> Any:
    """Convert a batch as the Trainer's loops do for a step: to its precision, on the LightningModule's device.

    Args:
        trainer: Provides the precision.
        pl_module: Its hooks, or its LightningDataModule's, transfer the batch.
        batch: A batch of a loader.
        index: Index of the loader.
    """
    device = next((p.device for p in pl_module.parameters()), torch.device("cpu"))
    batch = in_precision(trainer, pl_module, batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=index)
    return pl_module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=index)


class Look:
    """Reads the first batch of a Trainer's loop without consuming it.

    Args:
        source: Lightning's data source: loaders, or the module that creates them.
        name: The method that creates the loaders.
    """

    def __init__(self, source: Any, name: str) -> None:
        self._source = source
        self._name = name
        self._later: Any = None
        self._once: dict[int, Any] = {}
        self._loaders = self._make()

    def _make(self) -> Any:
        return getattr(self._source.instance, self._name)() if self._source.is_module() else self._source.instance

    def all_batches(self) -> Any:
        """Return the first batch for training, as Lightning makes it: for a collection of loaders, a collection."""
        loaders = self._loaders
        if isinstance(loaders, CombinedLoader):
            if loaders._mode == "sequential":
                return self.batch_of_first()
            loaders = loaders.iterables
        leaves, spec = tree_flatten(loaders)
        return tree_unflatten([self._peek(leaf, index) for index, leaf in enumerate(leaves)], spec)

    def batch_of_first(self) -> Any:
        """Return the first batch for evaluation, which iterates several loaders one after the other."""
        leaves = self._leaves(self._loaders)
        return self._peek(leaves[0], 0) if leaves else None

    @staticmethod
    def _leaves(loaders: Any) -> list[Any]:
        return tree_leaves(loaders.iterables if isinstance(loaders, CombinedLoader) else loaders)

    def _peek(self, loader: Any, index: int) -> Any:
        if loader is None:
            return None
        with generators_kept(loader):
            if not is_stream(loader):
                return _from_dataset(loader)
            found = first_batch(loader, lambda: self._again(index))
        if found.once:
            self._once[index] = found.loader
        return found.batch

    def _again(self, index: int) -> Any:
        """Return the loader that the loop will iterate: the same one, or a new one from the same module."""
        if self._later is None:
            self._later = self._make()
        return self._leaves(self._later)[index]

    def give_back(self) -> None:
        """Prepend batches read ahead to streams that yield each batch only once."""
        if not self._once:
            return
        loaders = self._later if self._later is not None else self._loaders
        leaves, spec = tree_flatten(loaders.iterables if isinstance(loaders, CombinedLoader) else loaders)
        leaves = [self._once.get(index, leaf) for index, leaf in enumerate(leaves)]
        if isinstance(loaders, CombinedLoader):
            loaders._iterables = tree_unflatten(leaves, spec)
            loaders._flattened = leaves
        else:
            loaders = tree_unflatten(leaves, spec)
        if self._source.is_module():
            _next_time(self._source.instance, self._name, loaders)
        else:
            self._source.instance = loaders

    @property
    def once(self) -> bool:
        """Whether some stream yields each batch only once."""
        return bool(self._once)


def _next_time(module: Any, name: str, result: Any) -> None:
    """Make a method return ``result`` at its next call, and restore it afterwards."""
    had = module.__dict__.get(name)

    def given() -> Any:
        if had is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = had
        return result

    module.__dict__[name] = given


def _from_dataset(loader: DataLoader[Any]) -> Any:
    """Return one batch of a map-style dataset without moving the loader's position."""
    dataset: Any = loader.dataset
    if loader.batch_sampler is None:
        return next(iter(loader), None)
    if loader.batch_size is not None:
        # Spread over the dataset, which may be sorted by class.
        size = min(loader.batch_size, MAX_BATCH, len(dataset))
        indices = [index * len(dataset) // size for index in range(size)]
        try:
            return _collate(loader, indices)
        except (LookupError, TypeError, ValueError):
            pass  # Not indexed by integers: only its sampler knows the keys.
    return _collate(loader, next(iter(loader.batch_sampler), []))


def _collate(loader: DataLoader[Any], indices: Any) -> Any:
    return loader.collate_fn([loader.dataset[index] for index in indices]) if len(indices) else None
