"""The networks whose latency is measured, as in their papers."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map images to feature maps."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 224x224 images: 11.7 M parameters."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        widths = [64, 64, 128, 256, 512]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(BasicBlock(before, width, 1 if width == 64 else 2), BasicBlock(width, width, 1))
                for before, width in itertools.pairwise(widths)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 224, 224) to scores (N, classes)."""
        return self.head(self.pool(self.stages(self.stem(x))).flatten(1))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and linear projection (Sandler et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [] if expansion == 1 else [_conv(inputs, hidden, 1)]
        self.layers = nn.Sequential(
            *layers,
            _conv(hidden, hidden, 3, stride, groups=hidden),
            nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.add = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map feature maps to feature maps."""
        return x + self.layers(x) if self.add else self.layers(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 for 224x224 images: 3.5 M parameters."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 32, 3, 2)]
        inputs = 32
        for expansion, outputs, count, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for index in range(count):
                layers.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, expansion))
                inputs = outputs
        self.features = nn.Sequential(*layers, _conv(320, 1280, 1))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 224, 224) to scores (N, classes)."""
        return self.head(self.features(x).mean((2, 3)))


class UNet(nn.Module):
    """Two levels of downsampling and upsampling, with a skip connection that is both pooled and concatenated."""

    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        self.first, self.second = _conv(3, 32, 3), _conv(32, 64, 3)
        self.low, self.join, self.out = _conv(64, 64, 3), _conv(128, 32, 3), nn.Conv2d(64, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores for each pixel."""
        one = self.first(x)
        two = self.second(nn.functional.max_pool2d(one, 2))
        low = self.low(nn.functional.max_pool2d(two, 2))
        up = self.join(torch.cat([nn.functional.interpolate(low, scale_factor=2.0), two], 1))
        scores: Tensor = self.out(torch.cat([nn.functional.interpolate(up, scale_factor=2.0), one], 1))
        return scores


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


def vit_tiny() -> nn.Module:
    """Return a vision transformer of the size of DeiT-Tiny (Touvron et al., 2021): 12 blocks, 5.7 M parameters."""
    from qat_lightning.demos import SmallViT  # imported here: it imports Lightning, whose memory would be measured

    return SmallViT(1000, image_size=224, patch_size=16, dim=192, depth=12, heads=3, mlp_ratio=4)


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with its ImageNet weights: 4.7 M parameters."""
    from benchmarks import photos

    return photos.efficientnet_lite0()


NETWORKS = {
    "resnet18": ResNet18,
    "mobilenetv2": MobileNetV2,
    "efficientnet_lite0": efficientnet_lite0,
    "vit_tiny": vit_tiny,
}
