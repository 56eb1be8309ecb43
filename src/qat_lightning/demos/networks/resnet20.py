"""ResNet-20 in the CIFAR style: three stages of three blocks, each block with one ReLU module used twice."""

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual add.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Stride of the first convolution; the shortcut is a 1x1 convolution where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map feature maps to feature maps."""
        y = self.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return result


class ResNet20(nn.Module):
    """ResNet-20 for images of 28x28 or 32x32.

    Args:
        num_classes: Number of outputs.
        in_channels: 1 for grayscale images, 3 for color.
        width: Channels of the first stage; each further stage has twice as many.
        blocks: Blocks in each of the three stages; 3 make ResNet-20, 5 ResNet-32.

    Example:
        >>> import torch
        >>> ResNet20()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        layers: list[nn.Module] = []
        channels = width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(blocks):
                layers.append(BasicBlock(channels, outputs, stride=2 if stage and not block else 1))
                channels = outputs
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to one score per class."""
        x = self.layers(self.relu(self.bn(self.conv(x))))
        scores: Tensor = self.classifier(self.flatten(self.pool(x)))
        return scores
