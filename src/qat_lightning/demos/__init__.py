"""The LightningModules and DataModules that train.py offers, and nothing that the library itself needs."""

from qat_lightning.demos.classification import ClassificationModule
from qat_lightning.demos.data import (
    Cifar10DataModule,
    DetectionCsvDataModule,
    DigitsDataModule,
    DigitTokensDataModule,
    FashionMnistDataModule,
    ImageFolderDataModule,
    TextFileDataModule,
)
from qat_lightning.demos.detection import DetectionModule
from qat_lightning.demos.language import LanguageModule
from qat_lightning.demos.networks import (
    BagOfTokens,
    CharTransformer,
    RecurrentClassifier,
    ResNet20,
    SingleShot,
    SmallMobileNet,
    SmallViT,
)

__all__ = [
    "BagOfTokens",
    "CharTransformer",
    "Cifar10DataModule",
    "ClassificationModule",
    "DetectionCsvDataModule",
    "DetectionModule",
    "DigitTokensDataModule",
    "DigitsDataModule",
    "FashionMnistDataModule",
    "ImageFolderDataModule",
    "LanguageModule",
    "RecurrentClassifier",
    "ResNet20",
    "SingleShot",
    "SmallMobileNet",
    "SmallViT",
    "TextFileDataModule",
]
