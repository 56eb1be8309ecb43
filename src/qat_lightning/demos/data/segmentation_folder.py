"""Your own images with masks: a folder of images and a folder of masks for each of train, val and test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from qat_lightning.demos.data.augment import augment
from qat_lightning.demos.data.image_folder import SUFFIXES
from qat_lightning.demos.data.images import ImageDataModule, Splits
from qat_lightning.demos.extras import require
from qat_lightning.errors import ConfigurationError

SPLITS = ("train", "val", "test")


class MaskedImages(ImageDataModule):
    """Base class of DataModules with images (N, C, H, W) and masks (N, H, W), which are augmented alike.

    Args:
        ignore_index: Label of ignored pixels, also used for padding of masks.
        settings: See `ImageDataModule`.
    """

    def __init__(self, *, ignore_index: int = 255, **settings: Any) -> None:
        super().__init__(**settings)
        self.ignore_index = ignore_index

    def augment(self, batch: tuple[Tensor, Tensor], generator: Generator) -> tuple[Tensor, Tensor]:
        """Crop and flip images and masks of a training batch alike."""
        images, masks = batch
        how: dict[str, Any] = {"crop_padding": self.crop_padding, "flip": self.flip}
        moved = augment(masks[:, None], generator.clone_state(), fill=self.ignore_index, **how)
        return augment(images, generator, **how), moved[:, 0]


class ImagesWithMasks(Dataset[tuple[Tensor, Tensor]]):
    """Normalized images of one folder, each with the mask of the same name in another.

    Args:
        images: Folder of the images.
        masks: Folder of the masks: one byte per pixel, as grayscale or palette PNG files named like the images.
        image_size: Height and width to resize to: images bilinearly, masks by nearest neighbor. None: no resizing.
        mean: Mean of each channel, on the scale 0 to 1. One number: images are read as grayscale.
        std: Standard deviation of each channel, on the same scale.

    Raises:
        ConfigurationError: A folder is missing or empty, or an image has no mask, or a mask no image.
    """

    def __init__(
        self,
        images: Path,
        masks: Path,
        image_size: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.samples = _pairs(images, masks)
        self.image_size = image_size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self._image = require("PIL.Image", needed_for="data=segmentation_folder")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.samples[index]
        pixels = self._pixels(image, "L" if len(self.mean) == 1 else "RGB", self._image.Resampling.BILINEAR)
        pixels = pixels.view(*pixels.shape[:2], -1).permute(2, 0, 1)
        return (pixels / 255 - self.mean) / self.std, self._pixels(mask, None, self._image.Resampling.NEAREST).long()

    def _pixels(self, path: Path, mode: str | None, resampling: Any) -> Tensor:
        with self._image.open(path) as file:
            image = file.convert(mode) if mode else file
            if self.image_size is not None:
                image = image.resize(self.image_size[::-1], resampling)
            return torch.from_numpy(np.asarray(image).copy())

    def check(self, num_classes: int, ignore_index: int) -> None:
        """Check every mask before training.

        Args:
            num_classes: Labels are from 0 to ``num_classes - 1``.
            ignore_index: Label of ignored pixels.

        Raises:
            ConfigurationError: A mask does not have one byte per pixel, differs from its image in size, or has an
                invalid label; or images differ in size and ``image_size`` is not given.
        """
        sizes: dict[tuple[int, int], Path] = {}
        for image, mask in self.samples:
            with self._image.open(image) as file:
                size = file.size
            with self._image.open(mask) as file:
                if file.mode not in ("L", "P"):
                    raise ConfigurationError(
                        f"{mask} has the mode {file.mode}. Expected a label in one byte a pixel: mode L or P."
                    )
                if file.size != size:
                    raise ConfigurationError(f"{mask} is {_by(file.size)} and its image {image.name} is {_by(size)}.")
                labels = np.unique(np.asarray(file))
            sizes.setdefault(size, image)
            if beyond := [int(label) for label in labels if label >= num_classes and label != ignore_index]:
                raise ConfigurationError(
                    f"{mask} has the label {beyond[0]}. Expected 0 to {num_classes - 1}, or {ignore_index} where a "
                    f"pixel is ignored: set data.num_classes={beyond[-1] + 1} or data.ignore_index={beyond[0]}."
                )
        if len(sizes) > 1 and self.image_size is None:
            (one, first), (other, second), *_ = sizes.items()
            raise ConfigurationError(
                f"{first} is {_by(one)} and {second} is {_by(other)}: set data.image_size=[{one[1]},{one[0]}], height "
                "and width, to resize all."
            )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Return each image with its mask."""
    found = []
    for folder, suffixes in ((images, SUFFIXES), (masks, (".png", ".bmp"))):
        if not folder.is_dir():
            raise ConfigurationError(
                f"{folder} does not exist. Say where images and masks are, with {{split}} for train, val and test: "
                "'data.datamodule.images=\"{split}/images\"' 'data.datamodule.masks=\"{split}/masks\"'."
            )
        files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes}
        if not files:
            raise ConfigurationError(f"{folder} has no files. Expected {', '.join(suffixes)}.")
        found.append(files)
    by_name, masks_by_name = found
    for one, other, folder, what in (
        (by_name, masks_by_name, masks, "mask"),
        (masks_by_name, by_name, images, "image"),
    ):
        if alone := sorted(one.keys() - other.keys()):
            raise ConfigurationError(
                f"{one[alone[0]]} has no {what} {alone[0]}.* in {folder}, as {len(alone)} of {len(one)}: names of "
                "images and masks must match except for the extension."
            )
    return [(path, masks_by_name[name]) for name, path in by_name.items()]


class SegmentationFolderDataModule(MaskedImages):
    """Images with a label per pixel, in folders for train, val and test.

    Batches are images of shape (N, C, H, W), float32, and masks of shape (N, H, W), int64.

    Args:
        path: The root folder.
        num_classes: Number of classes without void; checked against the masks.
        images: Folder of a split's images, relative to `path`; ``{split}`` stands for train, val and test.
        masks: Folder of its masks, likewise.
        ignore_index: Label of ignored pixels.
        image_size: Height and width to resize to. None: all images must have the same size.
        mean: Mean of each channel, on the scale 0 to 1. One number: images are read as grayscale.
        std: Standard deviation of each channel, on the same scale.
        batch_size: See `ImageDataModule`.
        num_workers: See `ImageDataModule`.
        seed: See `ImageDataModule`.
        crop_padding: See `ImageDataModule`; padding of masks is ignored.
        flip: See `ImageDataModule`.
        pin_memory: See `ImageDataModule`.

    Raises:
        ConfigurationError: A folder is missing, images and masks do not match, or a setting is out of range. The
            contents of masks are checked in `setup`.
    """

    needs = (*ImageDataModule.needs, "PIL.Image")

    def __init__(
        self,
        *,
        path: str | Path,
        num_classes: int,
        images: str = "{split}/images",
        masks: str = "{split}/masks",
        ignore_index: int = 255,
        image_size: Sequence[int] | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        crop_padding: int = 16,
        flip: bool = True,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            crop_padding=crop_padding,
            flip=flip,
            pin_memory=pin_memory,
        )
        if not isinstance(num_classes, int) or not 1 < num_classes <= 256:
            raise ConfigurationError(f"num_classes={num_classes!r} is not valid: give an integer from 2 to 256.")
        for name, value in (("images", images), ("masks", masks)):
            if "{split}" not in value:
                raise ConfigurationError(f"{name}={value!r} has no {{split}}, which stands for train, val and test.")
        self.num_classes = num_classes
        size = _height_and_width(image_size)

        def images_of(split: str) -> ImagesWithMasks:
            image_folder, mask_folder = (Path(path) / below.replace("{split}", split) for below in (images, masks))
            return ImagesWithMasks(image_folder, mask_folder, size, mean, std)

        self._sets = {split: images_of(split) for split in SPLITS}

    def load(self) -> Splits:
        """Return the three sets, after checking every mask."""
        for found in self._sets.values():
            found.check(self.num_classes, self.ignore_index)
        return Splits(**self._sets)


def _height_and_width(given: Sequence[int] | None) -> tuple[int, int] | None:
    if given is None:
        return None
    sides = [given] if isinstance(given, int | str) else list(given)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ConfigurationError(f"image_size={given!r} is not valid: give height and width, as [180,240], or null.")
    return sides[0], sides[1]
