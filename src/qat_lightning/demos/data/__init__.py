"""DataModules of the demos: digits, Fashion-MNIST, CIFAR-10, and a folder of your own images."""

from qat_lightning.demos.data.cifar10 import Cifar10DataModule
from qat_lightning.demos.data.digit_tokens import DigitTokensDataModule
from qat_lightning.demos.data.digits import DigitsDataModule
from qat_lightning.demos.data.fashion_mnist import FashionMnistDataModule
from qat_lightning.demos.data.image_folder import ImageFolderDataModule
from qat_lightning.demos.data.images import ImageDataModule
from qat_lightning.demos.data.resumable import EpochSampler, resumable_loader

__all__ = [
    "Cifar10DataModule",
    "DigitTokensDataModule",
    "DigitsDataModule",
    "EpochSampler",
    "FashionMnistDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "resumable_loader",
]
