"""A transposed convolution as a plain convolution and a pixel shuffle, for which every backend has int8 kernels.

With stride ``s`` each input sample adds to the outputs ``s * m + r`` for ``r`` below ``s``, and each phase ``r`` is a
separate convolution with every ``s``-th tap of the kernel (Shi et al., 2016, "Is the deconvolution layer the same as a
convolutional layer?", arXiv 1609.07009). torch's own int8 kernels are wrong for most shapes on x86.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class Subpixel:
    """The convolution that replaces a transposed one; each tuple has one number per spatial dimension.

    Attributes:
        stride: Stride of the transposed convolution, which is the number of phases.
        dilation: Dilation of the transposed convolution.
        taps: Kernel size of the convolution.
        padding: Padding of the convolution, on both sides.
        first: The first output that is kept.
        behind: Number of outputs at the end that are cut off.
        groups: Groups of both convolutions.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    taps: tuple[int, ...]
    padding: tuple[int, ...]
    first: tuple[int, ...]
    behind: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        output_padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Subpixel:
        """Create it from the settings of a transposed convolution.

        Example:
            >>> Subpixel.of((4,), (2,), (1,), (0,), (1,), 1)
            Subpixel(stride=(2,), dilation=(1,), taps=(2,), padding=(1,), first=(1,), behind=(1,), groups=1)
        """
        found = []
        for size, step, pad, more, spread in zip(kernel_size, stride, padding, output_padding, dilation, strict=True):
            whole = spread * (size - 1) + 1
            taps = math.ceil(max(whole, whole + more - pad) / step)
            behind = step * taps + pad - whole - more
            # Do not compute whole steps at either end that would be cut off.
            steps = min(pad // step, behind // step, taps - 1)
            found.append((taps, taps - 1 - steps, pad - steps * step, behind - steps * step))
        taps_of, padding_of, first, last = zip(*found, strict=True)
        return cls(tuple(stride), tuple(dilation), taps_of, padding_of, first, last, groups)

    @property
    def phases(self) -> int:
        """Number of channels of the convolution per channel of the transposed one."""
        return math.prod(self.stride)

    def weight(self, weight: Tensor) -> Tensor:
        """The convolution's weight.

        Args:
            weight: Weight of the transposed convolution, shape (input channels, output channels / groups, kernel size).

        Returns:
            Shape (output channels * phases, input channels / groups, taps).
        """
        dims = len(self.stride)
        weight = _dilated(weight, self.dilation)
        short = [taps * step - size for taps, step, size in zip(self.taps, self.stride, weight.shape[2:], strict=True)]
        weight = torch.nn.functional.pad(weight, [side for pad in reversed(short) for side in (0, pad)])
        split = [size for pair in zip(self.taps, self.stride, strict=True) for size in pair]
        inputs, outputs = weight.shape[0] // self.groups, weight.shape[1]
        weight = weight.reshape(self.groups, inputs, outputs, *split)
        taps, steps = [3 + 2 * dim for dim in range(dims)], [4 + 2 * dim for dim in range(dims)]
        weight = weight.permute(0, 2, *steps, 1, *taps)
        weight = weight.reshape(self.groups * outputs * self.phases, inputs, *self.taps)
        return weight.flip([2 + dim for dim in range(dims)])

    def bias(self, bias: Tensor) -> Tensor:
        """The convolution's bias: all phases of a channel share its bias."""
        return bias.repeat_interleave(self.phases)

    def moves(self) -> list[tuple[str, tuple[Any, ...]]]:
        """The steps that move the convolution's outputs to their places: tensor methods, and slices (``"getitem"``)."""
        dims = len(self.stride)
        steps, sizes = [2 + dim for dim in range(dims)], [2 + dims + dim for dim in range(dims)]
        found: list[tuple[str, tuple[Any, ...]]] = []
        if self.phases > 1:
            found.append(("unflatten", (1, (-1, *self.stride))))
            found.append(("permute", (0, 1, *(d for pair in zip(sizes, steps, strict=True) for d in pair))))
            found += [("flatten", (2 + 2 * dim, 3 + 2 * dim)) for dim in reversed(range(dims))]
        if any(self.first) or any(self.behind):
            ends = [slice(first, -last if last else None) for first, last in zip(self.first, self.behind, strict=True)]
            found.append(("getitem", ((slice(None), slice(None), *ends),)))
        return found

    def shuffled(self, outputs: Tensor) -> Tensor:
        """Move the convolution's outputs to their places; they may be integers, and a single sample without a batch."""
        single = outputs.dim() == 1 + len(self.stride)
        outputs = outputs.unsqueeze(0) if single else outputs
        for name, arguments in self.moves():
            if name == "unflatten":
                outputs = torch.unflatten(outputs, *arguments)  # Dynamo cannot trace the method
            else:
                outputs = outputs[arguments[0]] if name == "getitem" else getattr(outputs, name)(*arguments)
        return outputs.squeeze(0) if single else outputs


def subpixel_of(module: TransposedConvolution) -> Subpixel:
    """The convolution that replaces a layer."""
    padding = cast("tuple[int, ...]", module.padding)  # numbers only, unlike that of a convolution
    return Subpixel.of(
        module.kernel_size, module.stride, padding, module.output_padding, module.dilation, module.groups
    )


def _dilated(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """A kernel with zeros between its taps."""
    for dim, spread in enumerate(dilation, start=2):
        if spread > 1:
            zeros = torch.zeros_like(weight).unsqueeze(dim + 1)
            zeros = zeros.expand(*weight.shape[: dim + 1], spread - 1, *weight.shape[dim + 1 :])
            spread_out = torch.cat([weight.unsqueeze(dim + 1), zeros], dim + 1).flatten(dim, dim + 1)
            weight = spread_out.narrow(dim, 0, spread_out.shape[dim] - spread + 1)
    return weight
