"""Chain heads for each kind of layer; a transposed convolution runs as the convolution that replaces it.

The parameters are unchanged. The weight is rounded in the form that the int8 kernel uses.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.errors import NetworkError
from qat_lightning.layers.subpixel import Subpixel, subpixel_of
from qat_lightning.layers.transformer import Projection
from qat_lightning.modes.eager.layers import ChainHead, ConvHead1d, ConvHead2d, ConvHead3d, LinearHead, ProjectionHead


class TransposedHead(ChainHead):
    """A transposed convolution at the head of a chain."""

    _FLOAT: ClassVar[type[nn.Module]]
    _CONVOLUTION: ClassVar[Any]

    @property
    def subpixel(self) -> Subpixel:
        """The convolution that replaces it."""
        found: Subpixel | None = self.__dict__.get("_subpixel")
        if found is None:
            found = self.__dict__["_subpixel"] = subpixel_of(cast("Any", self))
        return found

    def kernel(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the convolution that replaces it."""
        subpixel = self.subpixel
        return subpixel.weight(self.weight), None if self.bias is None else subpixel.bias(self.bias)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See `ChainHead.forward`."""
        if output_size is None:
            return super().forward(input)
        if self.left_float:
            return self._run_float(input, output_size)
        raise NetworkError(
            f"A {self._FLOAT.__name__} was called without output_size= when the network was prepared, and now it is "
            "given one, which int8 kernels do not support. Give example_inputs= for which the forward takes this "
            "branch, or keep the layer float with exclude=."
        )

    def _apply_layer(self, x: Tensor, weight: Tensor) -> Tensor:
        subpixel = self.subpixel
        bias = None if self.bias is None else subpixel.bias(self.bias)
        outputs = self._CONVOLUTION(x, weight, bias, padding=subpixel.padding, groups=subpixel.groups)
        return subpixel.shuffled(outputs)

    def _run_float(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output: Tensor = self._FLOAT.forward(self, input, output_size)
        return output


class TransposedHead1d(TransposedHead, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` at the head of a chain."""

    _FLOAT, _CONVOLUTION = nn.ConvTranspose1d, staticmethod(F.conv1d)


class TransposedHead2d(TransposedHead, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` at the head of a chain."""

    _FLOAT, _CONVOLUTION = nn.ConvTranspose2d, staticmethod(F.conv2d)


class TransposedHead3d(TransposedHead, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` at the head of a chain."""

    _FLOAT, _CONVOLUTION = nn.ConvTranspose3d, staticmethod(F.conv3d)


HEADS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ConvHead1d,
    nn.Conv2d: ConvHead2d,
    nn.Conv3d: ConvHead3d,
    nn.ConvTranspose1d: TransposedHead1d,
    nn.ConvTranspose2d: TransposedHead2d,
    nn.ConvTranspose3d: TransposedHead3d,
    nn.Linear: LinearHead,
    Projection: ProjectionHead,
}
"""The head of each float layer."""
