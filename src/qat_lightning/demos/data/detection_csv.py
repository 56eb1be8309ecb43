"""Your own images with boxes: a folder of images, and a CSV file with a row for each box."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from qat_lightning.demos.data.augment import augment_boxes
from qat_lightning.demos.data.box_table import SPLITS, Row, check_images, read_boxes
from qat_lightning.demos.data.images import ImageDataModule, Splits
from qat_lightning.demos.extras import require
from qat_lightning.errors import ConfigurationError

Sample = tuple[Tensor, Tensor, Tensor, Tensor]


class BoxedImages(Dataset[Sample]):
    """Images with boxes at a fixed size: scaled with the aspect ratio kept, at the upper left, padded with the mean.

    A sample is the image (C, H, W), its boxes (m, 4) in pixels of that image, their labels (m,), int64, and the index
    of the image in the dataset. `pad_boxes` collates samples.

    Args:
        files: Image files.
        boxes: Boxes of each image, float of shape (m, 4), in pixels of its file.
        labels: Labels of each image, int64 of shape (m,).
        size: Height and width of the output images.
        mean: Mean of each channel, on the scale 0 to 1. One number: images are read as grayscale.
        std: Standard deviation of each channel, on the same scale.
    """

    def __init__(
        self,
        files: Sequence[Path],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.files, self.boxes, self.labels, self.size = files, boxes, labels, size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self._image = require("PIL.Image", needed_for="data=detection_csv")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        image, scale = self._read(self.files[index])
        return image, self.boxes[index] * scale, self.labels[index], torch.tensor(index)

    def _read(self, path: Path) -> tuple[Tensor, float]:
        with self._image.open(path) as file:
            image = file.convert("L" if len(self.mean) == 1 else "RGB")
        height, width = self.size
        scale = min(width / image.width, height / image.height)
        fitted = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(fitted, self._image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image).copy()).view(fitted[1], fitted[0], -1).permute(2, 0, 1)
        canvas = torch.zeros(len(self.mean), height, width)
        canvas[:, : fitted[1], : fitted[0]] = (pixels / 255 - self.mean) / self.std
        return canvas, scale


def pad_boxes(samples: Sequence[Sample]) -> Sample:
    """Collate images with boxes.

    Args:
        samples: N samples of `BoxedImages`.

    Returns:
        Images (N, C, H, W), boxes (N, M, 4), labels (N, M) and image indices (N,). M is the largest number of boxes of
        an image; missing boxes have the label -1.

    Example:
        >>> one, two = ((torch.zeros(3, 8, 8), torch.ones(m, 4), torch.ones(m).long(), torch.tensor(m)) for m in (1, 2))
        >>> pad_boxes([one, two])[2].tolist()
        [[1, -1], [1, 1]]
    """
    images, boxes, labels, numbers = zip(*samples, strict=True)
    padded = pad_sequence(list(boxes), batch_first=True)
    classes = pad_sequence(list(labels), batch_first=True, padding_value=-1)
    return torch.stack(images), padded, classes, torch.stack(numbers)


class DetectionCsvDataModule(ImageDataModule):
    """A folder of images, and a CSV file of boxes: split, image, label, xmin, ymin, xmax and ymax.

    Errors in the table or the images are reported before training (`qat_lightning.demos.data.box_table`).

    Args:
        path: The folder that contains both.
        num_classes: Number of labels; checked against the table. Their order is alphabetical.
        boxes: The table, relative to `path`.
        images: The folder of the images, relative to `path`.
        suffix: Appended to image names in the table, such as ``.jpg``.
        columns: The table's names for split, image, label, xmin, ymin, xmax and ymax, where they differ.
        skip_empty: Skip boxes without area; otherwise they are an error.
        image_size: Output size in pixels: side of a square, or height and width.
        multiple: Height and width must be multiples of this, for networks that downsample several times.
        mean: Mean of each channel, on the scale 0 to 1. One number: images are read as grayscale.
        std: Standard deviation of each channel, on the same scale.
        batch_size: See `ImageDataModule`.
        num_workers: See `ImageDataModule`.
        seed: See `ImageDataModule`.
        scale_jitter: Training images are scaled up or down by up to this fraction, at a random position; 0 for off.
        flip: Flip training images horizontally with probability 0.5.
        pin_memory: See `ImageDataModule`.

    Raises:
        ConfigurationError: A file is missing, the table or an argument is invalid, or the number of classes differs.
    """

    needs = (*ImageDataModule.needs, "PIL.Image")
    collate = staticmethod(pad_boxes)

    def __init__(
        self,
        *,
        path: str,
        num_classes: int,
        boxes: str = "boxes.csv",
        images: str = "images",
        suffix: str = "",
        columns: Mapping[str, str] | None = None,
        skip_empty: bool = False,
        image_size: int | Sequence[int] = 320,
        multiple: int = 32,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        scale_jitter: float = 0.25,
        flip: bool = True,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, flip=flip, pin_memory=pin_memory)
        if not 0 <= scale_jitter < 1:
            raise ConfigurationError(f"scale_jitter={scale_jitter!r} is not valid: give a number from 0 to below 1.")
        self.scale_jitter = scale_jitter
        self.size = _height_and_width(image_size, multiple)
        self.mean, self.std = tuple(mean), tuple(std)
        self.table, self.images, self.suffix = Path(path) / boxes, Path(path) / images, suffix
        self.rows = read_boxes(self.table, columns, skip_empty=skip_empty)
        self.classes = tuple(sorted({row.label for row in self.rows}))
        if len(self.classes) != num_classes:
            raise ConfigurationError(
                f"{self.table} has {len(self.classes)} classes ({', '.join(self.classes)}), not {num_classes}: set "
                f"data.num_classes={len(self.classes)}."
            )

    def load(self) -> Splits:
        """Return the training, validation and test sets."""
        check_images(self.table, self.rows, self._size_of)
        return Splits(*(self._of([row for row in self.rows if row.split == split]) for split in SPLITS))

    def augment(self, batch: Any, generator: torch.Generator) -> Any:
        """Scale and flip the images of a training batch with their boxes."""
        images, boxes, labels, numbers = batch
        images, boxes, labels = augment_boxes(
            images, boxes, labels, generator, scale_jitter=self.scale_jitter, flip=self.flip
        )
        return images, boxes, labels, numbers

    def _of(self, rows: Sequence[Row]) -> BoxedImages:
        by_image: dict[str, list[Row]] = {}
        for row in rows:
            by_image.setdefault(row.image, []).append(row)
        return BoxedImages(
            [self._file(name) for name in by_image],
            [torch.tensor([row.box for row in each]) for each in by_image.values()],
            [torch.tensor([self.classes.index(row.label) for row in each]) for each in by_image.values()],
            self.size,
            self.mean,
            self.std,
        )

    def _file(self, name: str) -> Path:
        return self.images / f"{name}{self.suffix}"

    def _size_of(self, name: str) -> tuple[int, int] | None:
        """Read width and height from the file's header only."""
        path = self._file(name)
        if not path.is_file():
            return None
        image = require("PIL.Image", needed_for="data=detection_csv")
        try:
            with image.open(path) as file:
                return int(file.width), int(file.height)
        except image.UnidentifiedImageError as error:
            raise ConfigurationError(f"{path} is not an image: {error}. Expected a JPEG, a PNG or the like.") from error


def _height_and_width(image_size: int | Sequence[int], multiple: int) -> tuple[int, int]:
    sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 and side % multiple == 0 for side in sides):
        raise ConfigurationError(
            f"image_size={image_size!r} is not valid: give one number or height and width, multiples of {multiple}, "
            f"like data.image_size={8 * multiple} or data.image_size=[{6 * multiple},{8 * multiple}]."
        )
    return sides[0], sides[1]
