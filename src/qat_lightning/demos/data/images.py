"""Base class of the demos' DataModules: resumable loaders and augmentation, images in memory as bytes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from qat_lightning.demos.data.augment import augment, batch_generator
from qat_lightning.demos.data.resumable import resumable_loader
from qat_lightning.demos.extras import require
from qat_lightning.errors import ConfigurationError


class ImageTensors(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory as bytes, normalized per batch.

    Args:
        images: uint8, of shape (N, C, H, W).
        labels: int64, of shape (N,).
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the same scale.

    Example:
        >>> data = ImageTensors(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(3), [0.5], [0.5])
        >>> images, labels = data.__getitems__([2, 0])
        >>> images.unique().tolist(), labels.tolist()
        ([1.0], [2, 0])
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images = images
        self.labels = labels
        self._scale = 1 / (255 * torch.tensor(std).view(-1, 1, 1))
        self._shift = -torch.tensor(mean).view(-1, 1, 1) / torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] * self._scale + self._shift, self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch, as torch's fetcher supports; much faster than one image at a time."""
        return self.images[indices] * self._scale + self._shift, self.labels[indices]


def as_batch(samples: Any) -> Any:
    """Collate samples; `ImageTensors` returns whole batches itself."""
    return samples if isinstance(samples, tuple) else default_collate(samples)


class Splits(NamedTuple):
    """The training, validation and test sets of a DataModule."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]


class ImageDataModule(LightningDataModule, ABC):
    """Base class of the demos' DataModules; subclasses `load` the three sets.

    Training order and augmentation are pure functions of (seed, epoch, position in the epoch). A run is reproducible,
    and a run resumed within an epoch gets the same data as an uninterrupted one, also with `num_workers`.

    Args:
        batch_size: Batch size per process.
        num_workers: Number of processes that prefetch data; 0 loads in the training process.
        seed: Seed of order and augmentation. The split does not depend on it.
        crop_padding: Training images are padded by this many pixels and randomly cropped to their size; 0 for off.
        flip: Flip training images horizontally with probability 0.5.
        pin_memory: Copy batches to page-locked memory, for a GPU.

    Raises:
        ConfigurationError: A number is out of range.
        MissingExtraError: A package for loading the data is not installed; at construction, before a run begins.
    """

    needs: ClassVar[tuple[str, ...]] = ("torchdata.stateful_dataloader",)
    """Modules of the extra `demos` that loading needs."""
    collate = staticmethod(as_batch)
    """Collate function; a module-level function, because workers pickle it."""

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        crop_padding: int = 0,
        flip: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        for module in self.needs:
            require(module, needed_for=type(self).__name__)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("crop_padding", crop_padding, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ConfigurationError(f"{name}={value!r} is not valid: give an integer of at least {least}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.crop_padding = crop_padding
        self.flip = flip
        self.pin_memory = pin_memory
        self._splits: Splits | None = None
        self._resume_from: dict[str, Any] | None = None

    @abstractmethod
    def load(self) -> Splits:
        """The training, validation and test sets."""

    @property
    def splits(self) -> Splits:
        """The three sets; loaded once."""
        if self._splits is None:
            self._splits = self.load()
        return self._splits

    def setup(self, stage: str) -> None:
        """Load the sets, so that errors in them are reported before training."""
        _ = self.splits

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader, with a new order each epoch."""
        loader = self._make_train_loader()
        if self._resume_from is not None:
            loader.load_state_dict(self._resume_from)  # type: ignore[attr-defined]
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the training loader.

        Lightning stores it too, but does not restore it for a loader that was created before its loops were restored,
        for example by `trainer.estimated_stepping_batches` in `configure_optimizers`.
        """
        loader: Any = None if self.trainer is None else self.trainer.train_dataloader
        return {"train_loader": loader.state_dict()} if hasattr(loader, "state_dict") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader continue from there."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._resume_from = state_dict.get("train_loader")

    def _make_train_loader(self) -> DataLoader[Any]:
        if self.trainer is None:
            return self._loader(self.splits.train, shuffle=True)
        share = self.trainer.world_size * self.batch_size
        batches = -(-len(self.splits.train) // share)  # type: ignore[arg-type]
        limit = self.trainer.limit_train_batches
        return self._loader(
            self.splits.train,
            shuffle=True,
            num_replicas=self.trainer.world_size,
            rank=self.trainer.global_rank,
            epoch=_epochs_done(self.trainer),
            batches_per_epoch=min(batches, limit) if isinstance(limit, int) else int(batches * limit),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation loader, without shuffling."""
        return self._loader(self.splits.val, shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test loader, without shuffling."""
        return self._loader(self.splits.test, shuffle=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test loader, without shuffling."""
        return self.test_dataloader()

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool, **where: int) -> DataLoader[Any]:
        return resumable_loader(
            dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=self.collate,
            **where,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches, on the device."""
        if self.trainer is None or not self.trainer.training:
            return batch
        self._resume_from = None  # later training loaders are for later epochs
        place = _epochs_done(self.trainer), self.trainer.fit_loop.epoch_loop.batch_idx + 1
        return self.augment(batch, batch_generator(self.seed, *place, self.trainer.global_rank))

    def augment(self, batch: Any, generator: torch.Generator) -> Any:
        """Crop and flip the images of a training batch; override it if labels have positions in the image.

        Args:
            batch: A batch on its device.
            generator: A CPU generator for this batch, to be used for all random numbers.

        Returns:
            The new batch.
        """
        if not (self.crop_padding or self.flip):
            return batch
        images, labels = batch
        return augment(images, generator, crop_padding=self.crop_padding, flip=self.flip), labels


def _epochs_done(trainer: Trainer) -> int:
    """Return the epoch that Lightning sets on samplers; `trainer.current_epoch` lags behind while a fit is resumed."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


def hold_out(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Split indices deterministically into training and validation sets with equal class shares.

    Args:
        labels: The class of each sample.
        count: Number of samples to hold out for validation.

    Returns:
        The training and validation indices, each in ascending order.

    Raises:
        ConfigurationError: There are not enough samples.

    Example:
        >>> train, val = hold_out(torch.tensor([0, 1] * 10), 4)
        >>> len(train), (val % 2).sum().item()
        (16, 2)
    """
    if not 0 < count < len(labels):
        raise ConfigurationError(
            f"{count} validation samples cannot be held out of {len(labels)}: give at least 1 and fewer than all."
        )
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[torch.sort(labels[shuffled], stable=True).indices]
    held = by_class[(torch.arange(count) * len(labels)) // count]  # evenly spaced over samples sorted by class
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held] = False
    return kept.nonzero().flatten(), held.sort().values
