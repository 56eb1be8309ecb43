"""scikit-learn's digits as token sequences: one token per pixel, for its position and intensity."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qat_lightning.demos.data.images import ImageDataModule, Splits, hold_out
from qat_lightning.demos.extras import require

LEVELS = 17
"""Number of intensities of a pixel: 0 to 16."""


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """Sequences in memory.

    Args:
        tokens: int64, of shape (N, length).
        labels: int64, of shape (N,).
    """

    def __init__(self, tokens: Tensor, labels: Tensor) -> None:
        self.tokens = tokens
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch."""
        return self.tokens[indices], self.labels[indices]


class DigitTokensDataModule(ImageDataModule):
    """10 classes, 64 tokens per sample out of 1,088: 1,077 to train, 270 to validate, 450 to test.

    The samples of each set are those of `DigitsDataModule`.

    Args:
        settings: See `ImageDataModule`; without augmentation.

    Example:
        >>> splits = DigitTokensDataModule().splits
        >>> tokens, label = splits.train[0]
        >>> [len(split) for split in splits], tuple(tokens.shape), bool(tokens.max() < 1088)
        ([1077, 270, 450], (64,), True)
    """

    needs = (*ImageDataModule.needs, "sklearn.datasets")

    def __init__(self, *, batch_size: int = 64, num_workers: int = 0, seed: int = 0, pin_memory: bool = False) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, pin_memory=pin_memory)

    def load(self) -> Splits:
        """Return the training, validation and test sets."""
        bunch = require("sklearn.datasets", needed_for="data=digit_tokens").load_digits()
        intensities = torch.from_numpy(bunch.images).round().long().flatten(1)
        tokens = torch.arange(intensities.shape[1]) * LEVELS + intensities
        labels = torch.from_numpy(bunch.target).long()
        rest, test = hold_out(labels, 450)
        inner_train, inner_val = hold_out(labels[rest], 270)
        chosen = (rest[inner_train], rest[inner_val], test)
        return Splits(*(Tokens(tokens[indices], labels[indices]) for indices in chosen))
