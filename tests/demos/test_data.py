"""The demos' data: splits, local files, errors."""

import gzip
import hashlib
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat_lightning.demos import (
    Cifar10DataModule,
    DigitsDataModule,
    DigitTokensDataModule,
    FashionMnistDataModule,
    ImageFolderDataModule,
)
from qat_lightning.demos.data import cifar10, fashion_mnist
from qat_lightning.demos.data.augment import augment, batch_generator
from qat_lightning.demos.extras import require
from qat_lightning.errors import ConfigurationError, MissingExtraError


def test_digits_have_the_same_disjoint_splits_whatever_the_seed() -> None:
    first, second = DigitsDataModule(seed=0).splits, DigitsDataModule(seed=1).splits
    assert [len(split) for split in first] == [1077, 270, 450]  # type: ignore[arg-type]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))  # type: ignore[attr-defined]
    for split in first:
        counts = split.labels.bincount()  # type: ignore[attr-defined]
        assert counts.max() - counts.min() <= 5


def test_tokens_say_where_and_how_bright_each_pixel_of_a_digit_is() -> None:
    images, tokens = DigitsDataModule().splits.test, DigitTokensDataModule().splits.test
    assert torch.equal(images.labels, tokens.labels)  # type: ignore[attr-defined]
    found = tokens.tokens  # type: ignore[attr-defined]
    assert torch.equal(found // 17, torch.arange(64).expand_as(found))
    bright = (found % 17 * 255 / 16).round().to(torch.uint8)
    assert torch.equal(bright, images.images.flatten(1))  # type: ignore[attr-defined]


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "not installed")
    for name, count in (("train", 6_000), ("t10k", 20)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", np.full((count, 28, 28), 7))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return tmp_path


def test_fashion_mnist_is_read_from_a_local_folder(fashion: Path) -> None:
    splits = FashionMnistDataModule(path=str(fashion)).splits
    assert [len(split) for split in splits] == [1_000, 5_000, 20]  # type: ignore[arg-type]
    image, label = splits.test[3]
    assert image.shape == (1, 28, 28)
    assert label == 3
    assert image[0, 0, 0].item() == pytest.approx((7 / 255 - 0.286) / 0.353, abs=1e-6)


def test_fashion_mnist_names_the_file_that_is_missing(fashion: Path) -> None:
    (fashion / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ConfigurationError, match=r"t10k-labels-idx1-ubyte\.gz does not exist"):
        FashionMnistDataModule(path=str(fashion))


def test_a_truncated_idx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]))
    with pytest.raises(ConfigurationError, match="cut short"):
        fashion_mnist.read_idx(tmp_path / "short")


def class_folders(folder: Path, splits: tuple[str, ...], classes: tuple[str, ...], size: tuple[int, int]) -> Path:
    for split in splits:
        for value, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", size, (20 * value, 0, 255)).save(folder / split / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("archive", [False, True])
def test_cifar10_is_read_from_class_folders_and_from_a_tar_of_them(archive: bool, tmp_path: Path) -> None:
    path = class_folders(tmp_path / "cifar10", ("train", "test"), cifar10.CLASSES, (32, 32))
    if archive:
        with tarfile.open(tmp_path / "cifar10.tar.xz", "w:xz") as tar:
            tar.add(path, arcname="cifar10")
        path = tmp_path / "cifar10.tar.xz"
    splits = Cifar10DataModule(path=str(path), validation=5).splits
    assert [len(split) for split in splits] == [15, 5, 20]  # type: ignore[arg-type]
    images, labels = splits.test.images, splits.test.labels  # type: ignore[attr-defined]
    assert torch.equal(images[:, 0, 0, 0], 20 * labels)
    assert images[:, 2].unique().tolist() == [255]


def test_cifar10_never_unpickles_a_batch_that_is_not_the_original(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    for name in cifar10.BATCHES:
        (tmp_path / name).write_bytes(pickle.dumps(Planted()))
    with pytest.raises(ConfigurationError, match="will not be unpickled"):
        cifar10.read_cifar10(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_cifar10_reads_original_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps(
        {"data": np.arange(2 * 3072, dtype=np.uint64).astype(np.uint8).reshape(2, 3072), "labels": [1, 9]}
    )
    checksum = hashlib.md5(content, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(cifar10, "BATCHES", dict.fromkeys(cifar10.BATCHES, checksum))
    for name in cifar10.BATCHES:
        (tmp_path / name).write_bytes(content)
    images, labels, test_images, _ = cifar10.read_cifar10(tmp_path)
    assert images.shape == (10, 3, 32, 32)
    assert labels.tolist() == [1, 9] * 5
    assert test_images.shape == (2, 3, 32, 32)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(ConfigurationError, match="lacks the CIFAR-10 batches data_batch_3"):
        cifar10.read_cifar10(tmp_path)


def test_cifar10_says_what_it_accepts(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ConfigurationError, match="Possible are: a folder or tar archive"):
            _ = Cifar10DataModule(path=str(path)).splits


def test_an_image_folder_is_resized_and_cropped_to_squares(tmp_path: Path) -> None:
    class_folders(tmp_path, ("train", "val", "test"), ("cat", "dog"), (40, 20))
    module = ImageFolderDataModule(path=str(tmp_path), num_classes=2, image_size=16, batch_size=3)
    assert module.classes == ("cat", "dog")
    images, labels = next(iter(module.val_dataloader()))
    assert images.shape == (3, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1]
    grey = ImageFolderDataModule(path=str(tmp_path), num_classes=2, image_size=16, mean=[0.5], std=[0.5])
    assert grey.splits.train[0][0].shape == (1, 16, 16)


def test_an_image_folder_says_how_many_classes_it_has(tmp_path: Path) -> None:
    class_folders(tmp_path, ("train", "val", "test"), ("cat", "dog"), (8, 8))
    with pytest.raises(ConfigurationError, match=r"data\.num_classes=2"):
        ImageFolderDataModule(path=str(tmp_path), num_classes=10)
    with pytest.raises(ConfigurationError, match="does not exist"):
        ImageFolderDataModule(path=str(tmp_path / "train"), num_classes=2)


def test_augmentation_crops_and_mirrors_and_draws_the_same_again() -> None:
    images = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6) + 1
    first, again, other = (augment(images, batch_generator(*k), crop_padding=2, flip=True) for k in ((1,), (1,), (2,)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == images.shape
    kept = set(first.unique().tolist()) - {0.0}
    assert kept <= set(images.unique().tolist())
    # all channels of an image are cropped and mirrored alike
    assert torch.equal(first[:, 1] - first[:, 0], torch.where(first[:, 0] > 0, 36.0, 0.0))


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'qat-lightning\[demos\]'"):
        require("no_such_package.module", needed_for="data=digits")


def test_a_data_module_says_at_once_which_package_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        MissingExtraError, match=r"DigitsDataModule needs the package 'sklearn'.*qat-lightning\[demos\]"
    ):
        DigitsDataModule()
