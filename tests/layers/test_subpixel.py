"""A transposed convolution equals the convolution that replaces it, for every shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning.layers.subpixel import Subpixel, subpixel_of

LAYERS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def moved(y: Tensor, subpixel: Subpixel) -> Tensor:
    for name, arguments in subpixel.moves():
        y = y[arguments[0]] if name == "getitem" else getattr(y, name)(*arguments)
    return y


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.integers(1, 3))
    per_dim: list[tuple[int, ...]] = []
    sizes = []
    for _ in range(dims):
        size, stride, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
        more = draw(st.integers(0, max(stride, dilation) - 1))
        length = draw(st.integers(1, 5))
        whole = (length - 1) * stride + dilation * (size - 1) + 1 + more
        pad = draw(st.integers(0, (whole - 1) // 2))
        per_dim.append((size, stride, pad, more, dilation))
        sizes.append(length)
    size, stride, pad, more, dilation = zip(*per_dim, strict=True)
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    layer = LAYERS[dims](
        inputs, outputs, size, stride, pad, more, groups=groups, bias=draw(st.booleans()), dilation=dilation
    ).double()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-9, 9, parameter.shape, generator=generator))
    return layer, torch.randint(-9, 9, (2, inputs, *sizes), generator=generator).double()


@settings(max_examples=200, deadline=None)
@given(layers())
def test_on_integers_both_are_equal(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    subpixel = subpixel_of(layer)  # type: ignore[arg-type]
    bias = None if layer.bias is None else subpixel.bias(layer.bias)  # type: ignore[arg-type]
    y = CONVOLUTIONS[x.ndim - 2](
        x,
        subpixel.weight(layer.weight),
        bias,
        padding=subpixel.padding,
        groups=subpixel.groups,  # type: ignore[arg-type]
    )
    assert torch.equal(moved(y, subpixel), layer(x))
