"""scikit-learn's handwritten digits: 1,797 images of 8x8, included in scikit-learn, so nothing is downloaded."""

import torch

from qat_lightning.demos.data.images import ImageDataModule, ImageTensors, Splits, hold_out
from qat_lightning.demos.extras import require


class DigitsDataModule(ImageDataModule):
    """10 classes, 1 channel, 8x8 pixels: 1,077 images to train, 270 to validate, 450 to test.

    Args:
        settings: See `ImageDataModule`.

    Example:
        >>> splits = DigitsDataModule().splits
        >>> [len(split) for split in splits], tuple(splits.train[0][0].shape)
        ([1077, 270, 450], (1, 8, 8))
    """

    needs = (*ImageDataModule.needs, "sklearn.datasets")

    def load(self) -> Splits:
        """Return the training, validation and test sets."""
        bunch = require("sklearn.datasets", needed_for="data=digits").load_digits()
        # scale pixels from 0..16 to 0..255, like other image datasets
        images = torch.from_numpy(bunch.images * 255 / 16).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(bunch.target).long()
        rest, test = hold_out(labels, 450)
        inner_train, inner_val = hold_out(labels[rest], 270)
        return Splits(
            *(
                ImageTensors(images[chosen], labels[chosen], mean=[0.305], std=[0.376])
                for chosen in (rest[inner_train], rest[inner_val], test)
            )
        )
