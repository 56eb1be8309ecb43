"""The LightningModules and DataModules that train.py offers, and nothing that the library itself needs."""

from qat_lightning.demos.classification import ClassificationModule
from qat_lightning.demos.data import (
    Cifar10DataModule,
    DigitsDataModule,
    FashionMnistDataModule,
    ImageFolderDataModule,
)
from qat_lightning.demos.networks import ResNet20, SmallMobileNet, SmallViT

__all__ = [
    "Cifar10DataModule",
    "ClassificationModule",
    "DigitsDataModule",
    "FashionMnistDataModule",
    "ImageFolderDataModule",
    "ResNet20",
    "SmallMobileNet",
    "SmallViT",
]
