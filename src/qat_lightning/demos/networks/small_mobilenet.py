"""A small MobileNetV2: inverted residuals with depthwise convolutions, BatchNorm and ReLU6."""

from collections.abc import Sequence

from torch import Tensor, nn


class InvertedResidual(nn.Module):
    """Widen with a 1x1 convolution, filter each channel by itself, narrow again; add the input where shapes allow.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Of the depthwise convolution.
        expansion: How many times wider the middle is.
        dilation: Of the depthwise convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, dilation: int = 1) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand = conv_bn_relu6(inputs, middle, kernel=1)
        self.depthwise = conv_bn_relu6(middle, middle, kernel=3, stride=stride, groups=middle, dilation=dilation)
        self.project = nn.Sequential(nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Images in, images out."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class SmallMobileNet(nn.Module):
    """MobileNetV2 made small: for 8x8 digits as it is, by `width` and `strides` for 28x28 and 32x32 images.

    Args:
        num_classes: Outputs.
        in_channels: 1 for grey images, 3 for colour.
        width: Channels of the first stage; each further stage has half as many again.
        strides: One stage each; 2 halves the image.
        blocks: Inverted residuals in each stage; those after the first have a residual add.
        expansion: How many times wider the middle of a block is.

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
        """Images in, one score for each class out."""
        x = self.head(self.stages(self.stem(x)))
        scores: Tensor = self.classifier(self.flatten(self.pool(x)))
        return scores


def conv_bn_relu6(
    inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size, up to its stride, with BatchNorm and ReLU6."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())
