"""A small U-Net: an encoder that halves the image, and a decoder that doubles it, with skip connections."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. (2015), with BatchNorm, a stem of stride 2 and nearest upsampling.

    Images may have any size of at least ``2 ** (depth + 1)`` pixels a side.

    Args:
        num_classes: Number of outputs per pixel.
        in_channels: 1 for grayscale images, 3 for color.
        width: Channels of the first stage; each further stage has twice as many.
        depth: Number of times that the encoder halves the image after the stem.

    Example:
        >>> UNet(num_classes=5, width=4, depth=2)(torch.zeros(2, 3, 18, 24)).shape
        torch.Size([2, 5, 18, 24])
    """

    def __init__(self, num_classes: int = 11, in_channels: int = 3, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem = conv_bn_relu(in_channels, width, stride=2)
        self.encoder = nn.ModuleList(
            _pair(before, after) for before, after in zip([width, *widths[:-1]], widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.decoder = nn.ModuleList(_pair(3 * after, after) for after in reversed(widths[:-1]))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape (N, C, H, W) to scores of shape (N, num_classes, H, W)."""
        size = x.shape[-2:]
        x = self.stem(x)
        seen: list[Tensor] = []
        for level, stage in enumerate(self.encoder):
            x = stage(x if level == 0 else self.pool(x))
            seen.append(x)
        for skip, stage in zip(reversed(seen[:-1]), self.decoder, strict=True):
            x = stage(torch.cat([skip, interpolate(x, size=skip.shape[-2:], mode="nearest")], dim=1))
        return interpolate(self.classifier(x), size=size, mode="nearest")


def _pair(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv_bn_relu(inputs, outputs), conv_bn_relu(outputs, outputs))


def conv_bn_relu(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Return a convolution with padding that keeps the size (except for its stride), BatchNorm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())
