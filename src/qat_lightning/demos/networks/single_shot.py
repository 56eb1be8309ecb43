"""A small detector without anchors: a residual backbone, a feature pyramid, and one head for all of its levels."""

import math

from torch import Tensor, nn
from torch.nn.functional import interpolate

from qat_lightning.demos.networks.resnet20 import BasicBlock

Level = tuple[Tensor, Tensor, Tensor]
"""The head's outputs for one level, of shapes (N, classes, H, W), (N, 4, H, W) and (N, 1, H, W)."""

PRIOR = 0.01
"""Initial class probability at each location, small because nearly all locations are background."""


class SingleShot(nn.Module):
    """A detector that predicts, at each position of three levels, class, distances to the box edges, and confidence.

    Each level has half the resolution of the previous one. The pyramid is that of Lin et al., 2017, "Feature Pyramid
    Networks for Object Detection", the head that of Tian et al., 2019, "FCOS: Fully Convolutional One-Stage Object
    Detection", which is one module called once per level. The head has no BatchNorm, whose statistics would mix the
    levels. The network contains only convolutions, BatchNorm, ReLU and additions; boxes are decoded in
    `qat_lightning.demos.detection`.

    Args:
        num_classes: Number of object classes.
        in_channels: 1 for grayscale images, 3 for color.
        width: Channels of the stem; each of the four stages doubles them.
        blocks: Residual blocks per stage.
        channels: Channels of the pyramid and the head.
        tower: Number of convolutions before the head's outputs, for classes and for boxes each.

    Example:
        >>> import torch
        >>> levels = SingleShot(num_classes=3)(torch.zeros(2, 3, 64, 96))
        >>> [tuple(scores.shape) for scores, distances, quality in levels]
        [(2, 3, 8, 12), (2, 3, 4, 6), (2, 3, 2, 3)]
    """

    strides = (8, 16, 32)
    """Pixels between neighboring locations on each level; image sizes must be multiples of the last."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: int = 16,
        blocks: int = 1,
        channels: int = 64,
        tower: int = 2,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.ModuleList(_stage(width * 2**index, blocks) for index in range(4))
        widths = [width * 2 ** (index + 2) for index in range(3)]
        self.laterals = nn.ModuleList(_conv_bn(inputs, channels, 1) for inputs in widths)
        self.smooth = nn.ModuleList(_conv_bn(channels, channels, 3) for _ in widths)
        self.head = Head(num_classes, channels, tower)

    def forward(self, x: Tensor) -> tuple[Level, ...]:
        """Detect objects.

        Args:
            x: Images of shape (N, in_channels, H, W), height and width multiples of 32.

        Returns:
            For each level the class scores before the sigmoid, the logarithms of the distances to the left, upper,
            right and lower edge in strides, and the quality (predicted IoU) before the sigmoid.
        """
        x = self.stages[0](self.stem(x))
        features = []
        for stage, lateral in zip(self.stages[1:], self.laterals, strict=True):
            x = stage(x)
            features.append(lateral(x))
        for index in (1, 0):  # from the coarse levels down to the fine ones
            features[index] = features[index] + interpolate(features[index + 1], scale_factor=2.0, mode="nearest")
        return tuple(self.head(smooth(feature)) for smooth, feature in zip(self.smooth, features, strict=True))


class Head(nn.Module):
    """Predicts classes, distances and quality for each location of a level; called once per level.

    Args:
        num_classes: Number of object classes.
        channels: Input channels, and channels of each convolution.
        tower: Number of convolutions before the outputs, for classes and for boxes each.
    """

    def __init__(self, num_classes: int, channels: int, tower: int) -> None:
        super().__init__()
        self.class_tower = _tower(channels, tower)
        self.box_tower = _tower(channels, tower)
        self.scores = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.quality = nn.Conv2d(channels, 1, 3, padding=1)
        for output in (self.scores, self.distances, self.quality):
            nn.init.normal_(output.weight, std=0.01)
            nn.init.zeros_(output.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.scores.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Level:
        """Map one level of the pyramid to its outputs."""
        boxes = self.box_tower(x)
        return self.scores(self.class_tower(x)), self.distances(boxes), self.quality(boxes)


def _stage(inputs: int, blocks: int) -> nn.Sequential:
    """Return a stage that halves the size and doubles the channels."""
    return nn.Sequential(
        BasicBlock(inputs, 2 * inputs, 2), *(BasicBlock(2 * inputs, 2 * inputs, 1) for _ in range(blocks - 1))
    )


def _conv_bn(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs))


def _tower(channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)
