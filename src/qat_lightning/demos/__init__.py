"""The LightningModules and DataModules that train.py offers, and nothing that the library itself needs."""

from qat_lightning.demos.classification import ClassificationModule
from qat_lightning.demos.data import (
    Cifar10DataModule,
    DigitsDataModule,
    DigitTokensDataModule,
    FashionMnistDataModule,
    ImageFolderDataModule,
)
from qat_lightning.demos.networks import BagOfTokens, RecurrentClassifier, ResNet20, SmallMobileNet, SmallViT

__all__ = [
    "BagOfTokens",
    "Cifar10DataModule",
    "ClassificationModule",
    "DigitTokensDataModule",
    "DigitsDataModule",
    "FashionMnistDataModule",
    "ImageFolderDataModule",
    "RecurrentClassifier",
    "ResNet20",
    "SmallMobileNet",
    "SmallViT",
]
