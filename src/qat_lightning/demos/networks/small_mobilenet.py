"""A small MobileNetV2: inverted residuals with depthwise convolutions, BatchNorm and ReLU6."""

from collections.abc import Sequence

from torch import Tensor, nn


class InvertedResidual(nn.Module):
    """Expands with a 1x1 convolution, applies a depthwise convolution, projects back; adds the input if shapes allow.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Stride of the depthwise convolution.
        expansion: Hidden channels relative to the input.
        dilation: Dilation of the depthwise convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, dilation: int = 1) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand = conv_bn_relu6(inputs, middle, kernel=1)
        self.depthwise = conv_bn_relu6(middle, middle, kernel=3, stride=stride, groups=middle, dilation=dilation)
        self.project = nn.Sequential(nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map feature maps to feature maps."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class SmallMobileNet(nn.Module):
    """A small MobileNetV2, by default for 8x8 digits; with `width` and `strides` for 28x28 and 32x32 images.

    Args:
        num_classes: Number of outputs.
        in_channels: 1 for grayscale images, 3 for color.
        width: Channels of the first stage; each further stage has 1.5 times as many.
        strides: Stride of each stage; 2 halves the image.
        blocks: Inverted residuals in each stage; those after the first have a residual add.
        expansion: Hidden channels of a block relative to its input.

    Example:
        >>> import torch
        >>> SmallMobileNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        width: int = 16,
        strides: Sequence[int] = (1, 2),
        blocks: int = 2,
        expansion: int = 3,
    ) -> None:
        super().__init__()
        self.stem = conv_bn_relu6(in_channels, width, kernel=3)
        stages: list[nn.Module] = []
        channels = width
        for index, stride in enumerate(strides):
            outputs = width + index * (width // 2)
            for block in range(blocks):
                stages.append(InvertedResidual(channels, outputs, stride if block == 0 else 1, expansion))
                channels = outputs
        self.stages = nn.Sequential(*stages)
        self.head = conv_bn_relu6(channels, 4 * channels, kernel=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(4 * channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to one score per class."""
        x = self.head(self.stages(self.stem(x)))
        scores: Tensor = self.classifier(self.flatten(self.pool(x)))
        return scores


def conv_bn_relu6(
    inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Return a convolution with padding that keeps the size (except for its stride), BatchNorm and ReLU6."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())
