"""The user's own metric on each part of the validation data.

The validation data is cut into parts of as many batches each, `MOST_PARTS` at most; where there are no more batches
than that, each batch is a part. Lightning's own validation then runs once for each part, with the hooks of the
LightningModule and of the LightningDataModule, so that the metric of a part is what the LightningModule logs for a
validation of that part alone: no metric has to be known here, nor how it is put together from batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden

from qat_lightning.errors import ConfigurationError

MOST_PARTS = 40


@dataclass(frozen=True)
class Parts:
    """A metric on each part of the validation data.

    Attributes:
        values: What the LightningModule logged for each.
        samples: How many samples each has.
    """

    values: tuple[float, ...]
    samples: tuple[int, ...]


def validate_whole(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule) -> dict[str, float]:
    """Validate once on all of it.

    Raises:
        ConfigurationError: There are several loaders, or nothing is logged.
    """
    results = trainer.validate(model, datamodule=datamodule, verbose=False)
    if len(results) > 1:
        raise ConfigurationError(
            f"Validation has {len(results)} loaders, and a target is judged on one. Give a datamodule whose "
            "val_dataloader returns one loader."
        )
    return {key: float(value) for result in results for key, value in result.items()}


def validate_parts(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule, metric: str, seed: int
) -> Parts:
    """Validate each part by itself; nothing of it is logged.

    Args:
        trainer: One that has just validated all of it (`validate_whole`).
        model: The LightningModule.
        datamodule: Set up already, by that.
        metric: The key that the LightningModule logs.
        seed: Of whatever its loader or its hooks draw, so that all networks see the same parts.

    Raises:
        ConfigurationError: A part has no such metric.
    """
    (count,) = trainer.num_val_batches
    size = 1 if math.isinf(count) else max(1, math.ceil(count / MOST_PARTS))
    seed_everything(seed, workers=True, verbose=False)
    batches = itertools.islice(datamodule.val_dataloader(), None if math.isinf(count) else int(count))
    values, samples = [], []
    with _quiet(trainer):
        while part := list(itertools.islice(batches, size)):
            (found,) = trainer.validate(model, datamodule=_Part(datamodule, model, part), verbose=False)
            if metric not in found:
                raise ConfigurationError(f"A validation of only {len(part)} batches does not log {metric!r}.")
            values.append(float(found[metric]))
            samples.append(sum(map(_samples, part)))
    return Parts(tuple(values), tuple(samples))


@contextmanager
def _quiet(trainer: Trainer) -> Iterator[None]:
    """Log nothing, and take all of what a part has."""
    loggers, limit = trainer.loggers, trainer.limit_val_batches
    trainer.loggers, trainer.limit_val_batches = [], 1.0
    try:
        yield
    finally:
        trainer.loggers, trainer.limit_val_batches = loggers, limit


def _samples(batch: Any) -> int:
    try:
        return int(extract_batch_size(batch))
    except MisconfigurationException:  # nothing in it has a size
        return 1


class _Batches:
    """A loader of batches that are there."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Part(LightningDataModule):
    """Some batches, with the transfer hooks of a LightningDataModule that is set up, or of the LightningModule."""

    def __init__(self, whole: LightningDataModule, model: LightningModule, batches: Sequence[Any]) -> None:
        super().__init__()
        self._whole, self._model, self._batches = whole, model, batches

    def val_dataloader(self) -> Any:
        return _Batches(self._batches)

    def _hook(self, name: str) -> Any:
        return getattr(self._whole if is_overridden(name, self._whole) else self._model, name)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._hook("on_before_batch_transfer")(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return self._hook("transfer_batch_to_device")(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._hook("on_after_batch_transfer")(batch, dataloader_idx)

    def __getattr__(self, name: str) -> Any:
        """What a step asks of ``trainer.datamodule`` besides."""
        if name.startswith("__") or "_whole" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_whole"], name)
