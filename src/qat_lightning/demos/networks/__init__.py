"""Networks of the demos, small enough for a laptop."""

from qat_lightning.demos.networks.char_transformer import CharTransformer
from qat_lightning.demos.networks.deeplab import DeepLabMobileNet
from qat_lightning.demos.networks.resnet20 import ResNet20
from qat_lightning.demos.networks.sequences import BagOfTokens, RecurrentClassifier
from qat_lightning.demos.networks.single_shot import SingleShot
from qat_lightning.demos.networks.small_mobilenet import SmallMobileNet
from qat_lightning.demos.networks.unet import UNet
from qat_lightning.demos.networks.vision_transformer import SmallViT

__all__ = [
    "BagOfTokens",
    "CharTransformer",
    "DeepLabMobileNet",
    "RecurrentClassifier",
    "ResNet20",
    "SingleShot",
    "SmallMobileNet",
    "SmallViT",
    "UNet",
]
