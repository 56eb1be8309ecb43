"""What the DataModules of the demos share: loaders that resume, augmentation that resumes, images held as bytes."""

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
    """Images in memory as bytes, normalized when a batch is asked for.

    Args:
        images: uint8, of shape (N, C, H, W).
        labels: int64, of shape (N,).
        mean: Of each channel, on the scale 0 to 1.
        std: Of each channel, on the same scale.

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
        """A whole batch at once, as torch's fetcher asks for it; far faster than one image at a time."""
        return self.images[indices] * self._scale + self._shift, self.labels[indices]


def as_batch(samples: Any) -> Any:
    """Put samples together; `ImageTensors` makes whole batches itself."""
    return samples if isinstance(samples, tuple) else default_collate(samples)


class Splits(NamedTuple):
    """The three sets of a DataModule."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]


class ImageDataModule(LightningDataModule, ABC):
    """Base of the demos' DataModules: subclasses say how to `load` the three sets.

    Training order and augmentation are pure functions of (seed, epoch, place in the epoch), so a run is reproducible
    and one resumed in the middle of an epoch sees what the uninterrupted one saw, also with `num_workers`.

    Args:
        batch_size: Images in a batch, of each process.
        num_workers: Processes that load ahead; 0 loads in the training process.
        seed: Of the order and of the augmentation. The split never depends on it.
        crop_padding: Training images are padded by so many pixels and cropped at random to their size; 0 for not.
        flip: Mirror half of the training images.
        pin_memory: Copy batches to page-locked memory, for a GPU.

    Raises:
        ConfigurationError: A number is out of range.
        MissingExtraError: A package that is needed to load the data is not installed; at construction, so before a run
            begins.
    """

    needs: ClassVar[tuple[str, ...]] = ("torchdata.stateful_dataloader",)
    """Modules of the extra `demos`, without which nothing can be loaded."""
    collate = staticmethod(as_batch)
    """Makes a batch of a list of samples. A function at the top of a module, since workers pickle it."""

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
                raise ConfigurationError(f"{name}={value!r} is not possible: give an integer of at least {least}.")
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
        """The three sets, loaded once."""
        if self._splits is None:
            self._splits = self.load()
        return self._splits

    def setup(self, stage: str) -> None:
        """Load the sets, so that what is wrong with them shows before training."""
        _ = self.splits

    def train_dataloader(self) -> DataLoader[Any]:
        """The training set, in a new order each epoch."""
        loader = self._make_train_loader()
        if self._resume_from is not None:
            loader.load_state_dict(self._resume_from)  # type: ignore[attr-defined]
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where the training loader is.

        Lightning keeps that too, but does not give it back to a loader that was made before its loops were restored, as
        a use of `trainer.estimated_stepping_batches` in `configure_optimizers` makes it.
        """
        loader: Any = None if self.trainer is None else self.trainer.train_dataloader
        return {"train_loader": loader.state_dict()} if hasattr(loader, "state_dict") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there with the next training loader."""
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
        """The validation set, in its own order."""
        return self._loader(self.splits.val, shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test set, in its own order."""
        return self._loader(self.splits.test, shuffle=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test set, in its own order."""
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
        self._resume_from = None  # a training loader that is made from now on is for a later epoch
        place = _epochs_done(self.trainer), self.trainer.fit_loop.epoch_loop.batch_idx + 1
        return self.augment(batch, batch_generator(self.seed, *place, self.trainer.global_rank))

    def augment(self, batch: Any, generator: torch.Generator) -> Any:
        """Crop and mirror the images of a training batch; to override where labels have a place in the image.

        Args:
            batch: On its device.
            generator: A CPU generator of this batch alone, from which everything is to be drawn.

        Returns:
            The new batch.
        """
        if not (self.crop_padding or self.flip):
            return batch
        images, labels = batch
        return augment(images, generator, crop_padding=self.crop_padding, flip=self.flip), labels


def _epochs_done(trainer: Trainer) -> int:
    """What Lightning gives to samplers as the epoch. `trainer.current_epoch` lags behind while a fit is resumed."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


def hold_out(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of a training set and of a validation set with equal shares of each class, always the same ones.

    Args:
        labels: The class of each sample.
        count: How many samples to hold out for validation.

    Returns:
        The indices to train on and those held out, each in ascending order.

    Raises:
        ConfigurationError: There are not so many samples.

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
    held = by_class[(torch.arange(count) * len(labels)) // count]  # evenly spaced through the classes
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held] = False
    return kept.nonzero().flatten(), held.sort().values
