"""A text file as byte sequences for next-byte prediction."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qat_lightning.demos.data.images import ImageDataModule, Splits
from qat_lightning.errors import ConfigurationError


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive sequences of a text, each with the same sequence shifted by one byte.

    Args:
        text: uint8, of shape (bytes,).
        context: Bytes per sequence.
    """

    def __init__(self, text: Tensor, context: int) -> None:
        count = (len(text) - 1) // context
        self.inputs = text[: count * context].view(count, context)
        self.targets = text[1 : count * context + 1].view(count, context)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index].long(), self.targets[index].long()

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch."""
        return self.inputs[indices].long(), self.targets[indices].long()


class TextFileDataModule(ImageDataModule):
    """Any text: the first 90 % for training, the next 5 % for validation, the last 5 % for testing.

    Args:
        path: The file.
        context: Bytes per sequence.
        batch_size: Sequences per batch and process.
        num_workers: Number of processes that prefetch data; 0 loads in the training process.
        seed: Seed of the order.
        pin_memory: Copy batches to page-locked memory, for a GPU.

    Raises:
        ConfigurationError: The file does not exist, or is too short for one sequence per set.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, pin_memory=pin_memory)
        if not isinstance(context, int) or context < 1:
            raise ConfigurationError(f"context={context!r} is not valid: give an integer of at least 1.")
        self.path, self.context = Path(path), context
        if not self.path.is_file():
            raise ConfigurationError(f"path={str(path)!r} is not a file. Expected a text, in any encoding.")

    def load(self) -> Splits:
        """Return the training, validation and test sets."""
        text = torch.frombuffer(bytearray(self.path.read_bytes()), dtype=torch.uint8)
        ends = 9 * len(text) // 10, 19 * len(text) // 20
        parts = text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]
        if min(map(len, parts)) <= self.context:
            raise ConfigurationError(
                f"{self.path} has {len(text)} bytes, 5 % of which are used for validation: too few for a sequence of "
                f"{self.context}. Give a longer text, or set data.datamodule.context={max(1, len(text) // 20 - 2)}."
            )
        return Splits(*(Windows(part, self.context) for part in parts))
