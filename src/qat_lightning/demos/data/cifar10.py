"""CIFAR-10: from a local folder or archive, as pickled batches or as class folders of images, or a checked download."""

import hashlib
import pickle
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from qat_lightning.demos.data.images import ImageDataModule, ImageTensors, Splits, hold_out
from qat_lightning.demos.extras import require
from qat_lightning.errors import ConfigurationError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_CHECKSUM = "md5:c58f30108f718f92721af3b95e74349a"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The batches are pickles, and unpickling runs code, so only files with the known checksum are unpickled.
BATCHES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
ACCEPTED = (
    "Possible are: a folder or tar archive with the python batches (cifar-10-batches-py/data_batch_1 ...), or one "
    "with train/<class>/*.png and test/<class>/*.png (or .jpg) of the ten classes"
)


class Cifar10DataModule(ImageDataModule):
    """10 classes, 3 channels, 32x32 pixels: 45,000 images to train, 5,000 to validate, 10,000 to test.

    Args:
        path: A folder or tar archive, of the original python batches or of `train/<class>/*.jpg` and
            `test/<class>/*.jpg` (also .png; figures on lossy copies are not CIFAR-10 figures). If not given, the
            original is downloaded into `download_dir`.
        download_dir: Folder for downloads.
        validation: Number of training images to hold out for validation.
        batch_size: See `ImageDataModule`.
        num_workers: See `ImageDataModule`.
        seed: See `ImageDataModule`.
        crop_padding: See `ImageDataModule`.
        flip: See `ImageDataModule`.
        pin_memory: See `ImageDataModule`.

    Raises:
        ConfigurationError: `path` is given and does not exist.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        download_dir: str = "data",
        validation: int = 5_000,
        batch_size: int = 128,
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
        self.path = None if path is None else Path(path)
        self.download_dir = Path(download_dir)
        self.validation = validation
        if self.path is not None and not self.path.exists():
            raise ConfigurationError(
                f"data.datamodule.path={path} does not exist. {ACCEPTED}. Leave it out to download CIFAR-10."
            )

    def prepare_data(self) -> None:
        """Download missing files."""
        if self.path is None:
            pooch = require("pooch", needed_for="Downloading CIFAR-10")
            name = URL.rpartition("/")[2]
            pooch.retrieve(URL, known_hash=ARCHIVE_CHECKSUM, fname=name, path=self.download_dir)

    def load(self) -> Splits:
        """Return the training, validation and test sets."""
        images, labels, test_images, test_labels = read_cifar10(self.path or self.download_dir / URL.rpartition("/")[2])
        train, val = hold_out(labels, self.validation)
        chosen = ((images[train], labels[train]), (images[val], labels[val]), (test_images, test_labels))
        return Splits(*(ImageTensors(x, y, mean=[0.491, 0.482, 0.447], std=[0.247, 0.243, 0.262]) for x, y in chosen))


def read_cifar10(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read CIFAR-10 in any form listed in `ACCEPTED`.

    Args:
        path: A folder or a tar archive.

    Returns:
        Training images (uint8, N x 3 x 32 x 32) and labels, test images and labels.

    Raises:
        ConfigurationError: The form is unknown, files are missing, or pickles are not the original ones.
    """
    batches: dict[str, tuple[Tensor, Tensor]] = {}
    pictures: dict[str, list[tuple[str, int, Tensor]]] = {"train": [], "test": []}
    for name, content in _files(path):
        if name.name in BATCHES:
            batches[name.name] = _unpickle(name, content)
        elif name.suffix in (".jpg", ".png") and len(name.parts) >= 3:
            split, label = name.parts[-3], name.parts[-2]
            if split in pictures and label in CLASSES:
                pictures[split].append((str(name), CLASSES.index(label), _decode(content)))
    if batches:
        if missing := sorted(BATCHES.keys() - batches):
            raise ConfigurationError(f"{path} lacks the CIFAR-10 batches {', '.join(missing)}.")
        train = [batches[name] for name in BATCHES if name != "test_batch"]
        images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
        return images, labels, *batches["test_batch"]
    if not pictures["train"] or not pictures["test"]:
        raise ConfigurationError(f"{path} does not look like CIFAR-10. {ACCEPTED}.")
    read: list[Tensor] = []
    for split in ("train", "test"):  # sorted by name, independent of the archive's order
        _, classes, decoded = zip(*sorted(pictures[split], key=lambda picture: picture[0]), strict=True)
        read += [torch.stack(decoded), torch.tensor(classes)]
    return read[0], read[1], read[2], read[3]


def _files(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    if path.is_dir():
        for file in path.rglob("*"):
            if file.is_file():
                yield PurePosixPath(file.as_posix()), file.read_bytes()
        return
    if not tarfile.is_tarfile(path):
        raise ConfigurationError(f"{path} is neither a folder nor a tar archive. {ACCEPTED}.")
    with tarfile.open(path) as archive:  # read sequentially; nothing is extracted to disk
        for member in archive:
            if member.isfile() and (stream := archive.extractfile(member)) is not None:
                yield PurePosixPath(member.name), stream.read()


def _unpickle(name: PurePosixPath, content: bytes) -> tuple[Tensor, Tensor]:
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != BATCHES[name.name]:
        raise ConfigurationError(
            f"{name} is not the original CIFAR-10 batch (its checksum is another), and it will not be unpickled. "
            "Remove it, and leave data.datamodule.path out to download the original."
        )
    batch = pickle.loads(content, encoding="latin1")
    return torch.from_numpy(batch["data"]).view(-1, 3, 32, 32), torch.tensor(batch["labels"])


def _decode(content: bytes) -> Tensor:
    image = require("PIL.Image", needed_for="Reading images").open(BytesIO(content)).convert("RGB")
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()
