"""LightningModules and DataModules for train.py; the library itself does not need them."""

from qat_lightning.demos.classification import ClassificationModule
from qat_lightning.demos.data import (
    Cifar10DataModule,
    DetectionCsvDataModule,
    DigitMasksDataModule,
    DigitsDataModule,
    DigitTokensDataModule,
    FashionMnistDataModule,
    ImageFolderDataModule,
    SegmentationFolderDataModule,
    TextFileDataModule,
)
from qat_lightning.demos.detection import DetectionModule
from qat_lightning.demos.language import LanguageModule
from qat_lightning.demos.networks import (
    BagOfTokens,
    CharTransformer,
    DeepLabMobileNet,
    RecurrentClassifier,
    ResNet20,
    SingleShot,
    SmallMobileNet,
    SmallViT,
    UNet,
)
from qat_lightning.demos.segmentation import SegmentationModule

__all__ = [
    "BagOfTokens",
    "CharTransformer",
    "Cifar10DataModule",
    "ClassificationModule",
    "DeepLabMobileNet",
    "DetectionCsvDataModule",
    "DetectionModule",
    "DigitMasksDataModule",
    "DigitTokensDataModule",
    "DigitsDataModule",
    "FashionMnistDataModule",
    "ImageFolderDataModule",
    "LanguageModule",
    "RecurrentClassifier",
    "ResNet20",
    "SegmentationFolderDataModule",
    "SegmentationModule",
    "SingleShot",
    "SmallMobileNet",
    "SmallViT",
    "TextFileDataModule",
    "UNet",
]
