"""Fashion-MNIST: 70,000 images of clothes, 28x28, from a local folder or a checked download."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat_lightning.demos.data.images import ImageDataModule, ImageTensors, Splits, hold_out
from qat_lightning.demos.extras import require
from qat_lightning.errors import ConfigurationError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
FILES = {
    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}


class FashionMnistDataModule(ImageDataModule):
    """10 classes, 1 channel, 28x28 pixels: 55,000 images to train, 5,000 to validate, 10,000 to test.

    Args:
        path: A folder with the four `...-ubyte` or `...-ubyte.gz` files. By default that of Debian's package
            `dataset-fashion-mnist` if it is installed, otherwise a download into `download_dir`.
        download_dir: Folder for downloads.
        batch_size: See `ImageDataModule`.
        num_workers: See `ImageDataModule`.
        seed: See `ImageDataModule`.
        crop_padding: See `ImageDataModule`.
        flip: See `ImageDataModule`.
        pin_memory: See `ImageDataModule`.

    Raises:
        ConfigurationError: `path` is given and lacks one of the files.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        download_dir: str = "data",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        crop_padding: int = 2,
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
        if path is None and DEBIAN.is_dir():
            path = str(DEBIAN)
        self.path = None if path is None else Path(path)
        self.download_dir = Path(download_dir) / "fashion_mnist"
        if self.path is not None:
            for name in FILES:
                _find(self.path, name)

    def prepare_data(self) -> None:
        """Download missing files."""
        if self.path is None:
            pooch = require("pooch", needed_for="Downloading Fashion-MNIST")
            for name, checksum in FILES.items():
                pooch.retrieve(URL + name, known_hash=checksum, fname=name, path=self.download_dir)

    def load(self) -> Splits:
        """Return the training, validation and test sets."""
        folder = self.path or self.download_dir
        images, labels, test_images, test_labels = (read_idx(_find(folder, name)) for name in FILES)
        train, val = hold_out(labels.long(), 5_000)
        chosen = ((images[train], labels[train]), (images[val], labels[val]), (test_images, test_labels))
        return Splits(*(ImageTensors(x[:, None], y.long(), mean=[0.286], std=[0.353]) for x, y in chosen))


def read_idx(path: Path) -> Tensor:
    """Read a uint8 array in MNIST's IDX format, possibly gzipped.

    Args:
        path: The file.

    Returns:
        uint8, with the shape given in the file.

    Raises:
        ConfigurationError: The file has another format, or is truncated.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = content[3] if len(content) > 4 and content[:3] == b"\0\0\x08" else 0  # \x08: unsigned bytes
    shape = np.frombuffer(content, dtype=">i4", offset=4, count=dimensions).tolist() if dimensions else []
    start = 4 + 4 * dimensions
    if not dimensions or len(content) - start != np.prod(shape):
        raise ConfigurationError(f"{path} is not an IDX file of bytes, as MNIST's are, or it is cut short.")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / name.removesuffix(".gz")):
        if path.is_file():
            return path
    raise ConfigurationError(
        f"Fashion-MNIST: {folder / name} does not exist. Expected a folder with {', '.join(FILES)} (also unzipped); "
        "give it as data.datamodule.path=FOLDER, or leave it out to download."
    )
