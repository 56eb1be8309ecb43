"""A small DeepLabV3: inverted residuals, the last of them dilated, and a head with several receptive fields."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from qat_lightning.demos.networks.small_mobilenet import InvertedResidual, conv_bn_relu6
from qat_lightning.demos.networks.unet import conv_bn_relu


class DeepLabMobileNet(nn.Module):
    """A small DeepLabV3 (Chen et al., 2017) on a small MobileNetV2 (Sandler et al., 2018).

    The encoder ends at an eighth of the image's size. Its head, atrous spatial pyramid pooling, runs convolutions of
    several dilations and a mean over the whole image side by side; scores are upsampled bilinearly.

    Args:
        num_classes: Number of outputs per pixel.
        in_channels: 1 for grayscale images, 3 for color.
        width: Channels of the first stage; the others have 2, 3, 4 and 6 times as many.
        blocks: Inverted residuals in each stage.
        expansion: Hidden channels of a block relative to its input.
        rates: Dilations of the head's convolutions.

    Example:
        >>> DeepLabMobileNet(num_classes=5, width=8, blocks=1)(torch.zeros(2, 3, 33, 48)).shape
        torch.Size([2, 5, 33, 48])
    """

    def __init__(
        self,
        num_classes: int = 11,
        in_channels: int = 3,
        width: int = 16,
        blocks: int = 2,
        expansion: int = 4,
        rates: Sequence[int] = (2, 4, 6),
    ) -> None:
        super().__init__()
        self.stem = conv_bn_relu6(in_channels, width, kernel=3, stride=2)
        stages: list[nn.Module] = []
        channels = width
        for factor, stride, dilation in ((2, 2, 1), (3, 2, 1), (4, 1, 2), (6, 1, 4)):
            for block in range(blocks):
                first = block == 0
                stages.append(InvertedResidual(channels, factor * width, stride if first else 1, expansion, dilation))
                channels = factor * width
        self.stages = nn.Sequential(*stages)
        self.head = _Pyramid(channels, 4 * width, rates)
        self.classifier = nn.Conv2d(4 * width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape (N, C, H, W) to scores of shape (N, num_classes, H, W)."""
        scores = self.classifier(self.head(self.stages(self.stem(x))))
        return interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)


class _Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: convolutions with several dilations, and global pooling; keeps the size."""

    def __init__(self, inputs: int, outputs: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_bn_relu(inputs, outputs, kernel=1),
                *(conv_bn_relu(inputs, outputs, dilation=rate) for rate in rates),
            ]
        )
        # without BatchNorm, which cannot compute statistics of a batch of one pooled image
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, outputs, 1), nn.ReLU())
        self.project = conv_bn_relu((2 + len(rates)) * outputs, outputs, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        whole = interpolate(self.whole(x), size=x.shape[-2:], mode="nearest")
        y: Tensor = self.project(torch.cat([*(branch(x) for branch in self.branches), whole], dim=1))
        return y
