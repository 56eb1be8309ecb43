"""The user's own metric on each part of the validation data.

The validation data is split into at most `MOST_PARTS` parts with the same number of batches; if there are no more
batches than that, each batch is a part. Lightning's own validation runs once per part, with the hooks of the
LightningModule and the LightningDataModule. The metric of a part is therefore what the LightningModule logs when it
validates that part alone, and nothing needs to be known here about how a metric is computed from batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves

from qat_lightning.errors import ConfigurationError
from qat_lightning.numerics.sqnr import finite

MOST_PARTS = 40


@dataclass(frozen=True)
class Parts:
    """A metric on each part of the validation data.

    Attributes:
        values: The logged value for each part.
        samples: The number of samples in each part.
        means: For every key that all parts log, the mean over the parts, weighted by samples.
    """

    values: tuple[float, ...]
    samples: tuple[int, ...]
    means: Mapping[str, float] = field(default_factory=dict)

    def tell(self, whole: Mapping[str, float]) -> bool:
        """Whether the means equal what one validation of all the data logs, as for accuracies and losses.

        Example:
            >>> parts = Parts((1.0, 0.5), (1, 1), {"val/acc": 0.75})
            >>> parts.tell({"val/acc": 0.75}), parts.tell({"val/acc": 0.75, "val/f1": 0.7})
            (True, False)
        """
        return self.means.keys() == whole.keys() and all(
            math.isclose(self.means[key], value, rel_tol=_SAME, abs_tol=_SAME) for key, value in whole.items()
        )


_SAME = 1e-5
"""The tolerance, since float32 sums depend on the order."""


def set_up(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule) -> None:
    """Let the Trainer set up the model and the data as for a validation, without running any batch."""
    limit = trainer.limit_val_batches
    trainer.limit_val_batches = 0
    try:
        trainer.validate(model, datamodule=datamodule, verbose=False)
    finally:
        trainer.limit_val_batches = limit


def validate_whole(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule) -> dict[str, float]:
    """Validate once on all of the data.

    Raises:
        ConfigurationError: There are several loaders.
    """
    results = trainer.validate(model, datamodule=datamodule, verbose=False)
    if len(results) > 1:
        raise ConfigurationError(
            f"Validation has {len(results)} loaders, and a target is judged on one. Give a datamodule whose "
            "val_dataloader returns one loader."
        )
    return {key: float(value) for result in results for key, value in result.items()}


def validate_parts(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule,
    metric: str,
    seed: int,
    count: float | None,
) -> Parts:
    """Validate each part separately, without logging.

    Args:
        trainer: A Trainer that has set up the model and the data, by `validate_whole` or `set_up`.
        model: The LightningModule.
        datamodule: The data, already set up.
        metric: The key that the LightningModule logs.
        seed: The seed for random numbers in loaders and hooks, so that all networks see the same parts.
        count: The number of validation batches; None or infinite for a loader without a length.

    Raises:
        ConfigurationError: A part does not log the metric.
    """
    most = None if count is None or math.isinf(count) else int(count)
    size = 1 if most is None else max(1, math.ceil(most / MOST_PARTS))
    seed_everything(seed, workers=True, verbose=False)
    batches = itertools.islice(only_loader(datamodule.val_dataloader()), most)
    found: list[dict[str, float]] = []
    samples: list[int] = []
    with _quiet(trainer):
        while part := list(itertools.islice(batches, size)):
            (logged,) = trainer.validate(model, datamodule=_Part(datamodule, model, part), verbose=False)
            if metric not in logged:
                raise ConfigurationError(f"A validation of only {len(part)} batches does not log {metric!r}.")
            found.append({key: float(value) for key, value in logged.items()})
            samples.append(sum(map(_samples, part)))
    return Parts(tuple(one[metric] for one in found), tuple(samples), _means(found, samples))


def _means(found: Sequence[Mapping[str, float]], samples: Sequence[int]) -> dict[str, float]:
    """The mean of each metric that every part logs, weighted by samples, where it is finite."""
    everywhere = [key for key in found[0] if all(key in one for one in found)] if found else []
    total = sum(samples)
    return finite({key: sum(one[key] * n for one, n in zip(found, samples, strict=True)) / total for key in everywhere})


def only_loader(loaders: Any) -> Any:
    """The loader in a collection of one, as ``val_dataloader`` may return it; anything else as it is.

    Example:
        >>> only_loader(["loader"]), only_loader("loader"), only_loader(["one", "two"])
        ('loader', 'loader', ['one', 'two'])
    """
    leaves = tree_leaves(loaders)
    return leaves[0] if len(leaves) == 1 else loaders


@contextmanager
def _quiet(trainer: Trainer) -> Iterator[None]:
    """Log nothing, and validate every batch of a part."""
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
    """A loader of batches in memory."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Part(LightningDataModule):
    """Some batches, with the transfer hooks of the LightningDataModule or the LightningModule."""

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
        """Other attributes that a step reads from ``trainer.datamodule``."""
        if name.startswith("__") or "_whole" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_whole"], name)
