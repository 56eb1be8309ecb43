"""DataModules of the demos: known data sets, and images, images with boxes, and a text of your own."""

from qat_lightning.demos.data.cifar10 import Cifar10DataModule
from qat_lightning.demos.data.detection_csv import DetectionCsvDataModule
from qat_lightning.demos.data.digit_masks import DigitMasksDataModule
from qat_lightning.demos.data.digit_tokens import DigitTokensDataModule
from qat_lightning.demos.data.digits import DigitsDataModule
from qat_lightning.demos.data.fashion_mnist import FashionMnistDataModule
from qat_lightning.demos.data.image_folder import ImageFolderDataModule
from qat_lightning.demos.data.images import ImageDataModule
from qat_lightning.demos.data.resumable import EpochSampler, resumable_loader
from qat_lightning.demos.data.segmentation_folder import MaskedImages, SegmentationFolderDataModule
from qat_lightning.demos.data.text_file import TextFileDataModule

__all__ = [
    "Cifar10DataModule",
    "DetectionCsvDataModule",
    "DigitMasksDataModule",
    "DigitTokensDataModule",
    "DigitsDataModule",
    "EpochSampler",
    "FashionMnistDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "MaskedImages",
    "SegmentationFolderDataModule",
    "TextFileDataModule",
    "resumable_loader",
]
