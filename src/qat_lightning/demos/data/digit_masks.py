"""scikit-learn's digits scattered over larger images, with a label for each pixel: background or which digit."""

import torch
from torch import Tensor

from qat_lightning.demos.data.digits import DigitsDataModule
from qat_lightning.demos.data.images import ImageTensors, Splits
from qat_lightning.demos.data.segmentation_folder import MaskedImages

SIDE = 32
"""Side of a scene in pixels; a digit has 16."""
SCENES = (512, 128, 128)
DIGITS = 3
INK = 96
"""Pixels of a digit of at least this brightness belong to it; darker pixels that are not black are ignored."""


class DigitMasksDataModule(MaskedImages):
    """Background and ten digits, 1 channel, 32x32 pixels: 512 images to train, 128 to validate, 128 to test.

    The digits of each set are those of `DigitsDataModule`; their positions do not depend on the seed.

    Args:
        settings: See `ImageDataModule`.

    Example:
        >>> splits = DigitMasksDataModule().splits
        >>> image, mask = splits.val[0]
        >>> [len(split) for split in splits], tuple(image.shape), tuple(mask.shape)
        ([512, 128, 128], (1, 32, 32), (32, 32))
    """

    needs = DigitsDataModule.needs

    def __init__(
        self,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        crop_padding: int = 0,
        flip: bool = False,
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

    def load(self) -> Splits:
        """Return the training, validation and test sets."""
        generator = torch.Generator().manual_seed(0)
        sets = []
        for digits, count in zip(DigitsDataModule().splits, SCENES, strict=True):
            assert isinstance(digits, ImageTensors)
            images, masks = _scenes(digits.images, digits.labels, count, self.ignore_index, generator)
            sets.append(ImageTensors(images, masks, mean=[0.16], std=[0.27]))
        return Splits(*sets)


def _scenes(digits: Tensor, labels: Tensor, count: int, void: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images of shape (count, 1, side, side), uint8, and masks of shape (count, side, side), int64."""
    large = digits.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, 0]
    side = large.shape[-1]
    images = torch.randint(32, (count, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    which = torch.randint(len(digits), (count, DIGITS), generator=generator)
    corners = torch.randint(SIDE - side + 1, (count, DIGITS, 2), generator=generator)
    for scene in range(count):
        for digit, (top, left) in zip(which[scene].tolist(), corners[scene].tolist(), strict=True):
            where = scene, slice(top, top + side), slice(left, left + side)
            ink = large[digit]
            images[where] = torch.maximum(images[where], ink)
            masks[where] = torch.where(ink > 0, void, masks[where])
            masks[where] = torch.where(ink >= INK, 1 + int(labels[digit]), masks[where])
    return images[:, None], masks
