"""Your own images: train/ val/ test/, each with one folder of images per class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qat_lightning.demos.data.images import ImageDataModule, Splits
from qat_lightning.demos.extras import require
from qat_lightning.errors import ConfigurationError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images in class folders, resized by the shorter side and center-cropped to a square.

    Args:
        folder: Contains one folder per class.
        classes: Names of the classes; the index is the label.
        image_size: Side of the square, in pixels.
        mean: Mean of each channel, on the scale 0 to 1. One number: images are read as grayscale.
        std: Standard deviation of each channel, on the same scale.

    Raises:
        ConfigurationError: A class has no images.
    """

    def __init__(
        self, folder: Path, classes: Sequence[str], image_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.samples: list[tuple[Path, int]] = []
        for label, name in enumerate(classes):
            found = sorted(path for path in (folder / name).glob("**/*") if path.suffix.lower() in SUFFIXES)
            if not found:
                raise ConfigurationError(
                    f"{folder / name} has no images. Every class of train/ needs some in each of train/, val/ and "
                    f"test/, as {', '.join(SUFFIXES)}."
                )
            self.samples += [(path, label) for path in found]
        self.image_size = image_size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self._image = require("PIL.Image", needed_for="data=image_folder")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        with self._image.open(path) as file:
            image = file.convert("L" if len(self.mean) == 1 else "RGB")
        scale = self.image_size / min(image.size)
        width, height = (max(self.image_size, round(side * scale)) for side in image.size)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        image = image.resize((width, height), self._image.Resampling.BILINEAR)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        pixels = torch.from_numpy(np.asarray(image).copy()).view(self.image_size, self.image_size, -1)
        return (pixels.permute(2, 0, 1) / 255 - self.mean) / self.std, label


class ImageFolderDataModule(ImageDataModule):
    """Images in `train/`, `val/` and `test/`, each with one folder per class.

    Args:
        path: The folder.
        num_classes: Number of classes; checked against the folders.
        image_size: Side of the square images for the network, in pixels.
        mean: Mean of each channel, on the scale 0 to 1. One number: images are read as grayscale.
        std: Standard deviation of each channel, on the same scale.
        batch_size: See `ImageDataModule`.
        num_workers: See `ImageDataModule`.
        seed: See `ImageDataModule`.
        crop_padding: See `ImageDataModule`.
        flip: See `ImageDataModule`.
        pin_memory: See `ImageDataModule`.

    Raises:
        ConfigurationError: A folder is missing, or the number of classes differs.
    """

    needs = (*ImageDataModule.needs, "PIL.Image")

    def __init__(
        self,
        *,
        path: str,
        num_classes: int,
        image_size: int = 64,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        crop_padding: int = 4,
        flip: bool = True,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            crop_padding=crop_padding,
            flip=flip,
            pin_memory=pin_memory,
        )
        self.path = Path(path)
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        for split in ("train", "val", "test"):
            if not (self.path / split).is_dir():
                raise ConfigurationError(
                    f"{self.path / split} does not exist. Expected {path}/train/<class>/*, {path}/val/<class>/* and "
                    f"{path}/test/<class>/*; give the folder as data.datamodule.path=FOLDER."
                )
        self.classes = tuple(sorted(entry.name for entry in (self.path / "train").iterdir() if entry.is_dir()))
        if len(self.classes) != num_classes:
            raise ConfigurationError(
                f"{self.path / 'train'} has {len(self.classes)} classes ({', '.join(self.classes)}), "
                f"not {num_classes}: set data.num_classes={len(self.classes)}."
            )

    def load(self) -> Splits:
        """Return the training, validation and test sets."""
        sets = (
            ImageFolder(self.path / split, self.classes, self.image_size, self.mean, self.std)
            for split in ("train", "val", "test")
        )
        return Splits(*sets)
