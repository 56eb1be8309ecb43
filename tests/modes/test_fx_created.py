"""Mode fx with tensors that forward creates from sizes, such as coordinates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Example, Recipe, convert, prepare

pytestmark = pytest.mark.usefixtures("without_compiler")


def from_grid(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y])


def from_rows(height: int, width: int) -> Tensor:
    x = torch.linspace(-1, 1, width).expand(height, width)
    return torch.cat([x[None], torch.linspace(-1, 1, height).view(1, height, 1).expand(1, height, width)])


def from_integers(height: int, width: int) -> Tensor:
    x = torch.arange(width).float().expand(height, width)
    return torch.stack([x, torch.arange(height)[:, None].float().expand(height, width)])


class WithCoordinates(nn.Module):
    """A convolution of an image and its coordinates (CoordConv)."""

    def __init__(self, coordinates: Callable[[int, int], Tensor], *, first: bool) -> None:
        super().__init__()
        self.coordinates, self.first = coordinates, first
        self.convolution = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        batch, _, height, width = image.shape
        added = self.coordinates(height, width)[None].expand(batch, -1, -1, -1)
        return self.convolution(torch.cat([added, image] if self.first else [image, added], 1))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("coordinates", [from_grid, from_rows, from_integers])
def test_a_convolution_of_an_image_and_its_coordinates_is_int8(
    coordinates: Callable[[int, int], Tensor], first: bool
) -> None:
    torch.manual_seed(0)
    network = WithCoordinates(coordinates, first=first)
    image = torch.randn(2, 3, 6, 5)
    prepared = prepare(network, Example((image,)), Recipe("fx", "x86"))
    prepared.train()(image).sum().backward()
    int8 = convert(prepared, Example((image,)))
    assert [(row.name, row.quantized) for row in int8.coverage] == [("convolution", True)]
    assert next(row for row in int8.operations if row.kind == "cat").quantized
    torch.testing.assert_close(int8(image), prepared.eval()(image), atol=1e-5, rtol=0)
    wider = torch.randn(1, 3, 6, 9)
    torch.testing.assert_close(int8(wider), prepared(wider), atol=1e-5, rtol=0)
