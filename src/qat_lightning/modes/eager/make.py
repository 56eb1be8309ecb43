"""Creating the int8 layer of a chain; its weights and grids are set later."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
from torch import nn

from qat_lightning.layers.operators import module_types
from qat_lightning.layers.subpixel import Subpixel, subpixel_of
from qat_lightning.modes.eager.chains import Chain
from qat_lightning.modes.eager.int8 import Int8BatchNorm, Int8Hardtanh, Int8Layer, Int8ReLU, Int8ReLU6
from qat_lightning.modes.eager.layers import become

_OPS: dict[tuple[str, bool], type[nn.Module]] = {
    ("Conv1d", False): nnq.Conv1d,
    ("Conv2d", False): nnq.Conv2d,
    ("Conv3d", False): nnq.Conv3d,
    ("Linear", False): nnq.Linear,
    ("Conv1d", True): nniq.ConvReLU1d,
    ("Conv2d", True): nniq.ConvReLU2d,
    ("Conv3d", True): nniq.ConvReLU3d,
    ("Linear", True): nniq.LinearReLU,
}
_LINKS: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: Int8ReLU,
    nn.ReLU6: Int8ReLU6,
    nn.Hardtanh: Int8Hardtanh,
}


def make_int8(modules: dict[str, nn.Module], chain: Chain, activation_dtype: torch.dtype) -> Int8Layer:
    """Turn the float layers of a chain into int8 ones, whose weights and grids are set later.

    Args:
        modules: Every module of the network by its name.
        chain: The chain.
        activation_dtype: ``torch.quint8`` or ``torch.qint8``.
    """
    head: Any = modules[chain.name]
    subpixel = subpixel_of(cast("Any", head)) if isinstance(head, module_types("transposed")) else None
    op = _empty_op(head, chain, subpixel)
    become(head, Int8Layer, chain=chain, pending=chain.links, activation_dtype=activation_dtype, subpixel=subpixel)
    for contents in (head._parameters, head._buffers, head._modules):
        contents.clear()
    head.__dict__.pop("attention", None)
    head.register_buffer("input_scale", torch.tensor(0.0))
    head.register_buffer("input_zero_point", torch.tensor(0))
    if chain.calls > 1:
        head.register_buffer("later_grids", torch.zeros(chain.calls - 1, 4, dtype=torch.float64))
    head.op = op
    for name in chain.links:
        link = modules[name]
        if name == chain.batchnorm:
            become(link, Int8BatchNorm, link=name)
            link._parameters.clear()
            link._buffers.clear()
        elif type(link) in _LINKS:
            become(link, _LINKS[type(link)], link=name)
    assert isinstance(head, Int8Layer)
    return head


def _empty_op(head: Any, chain: Chain, subpixel: Subpixel | None) -> Any:
    cls: Any = _OPS[chain.kind.replace("Transpose", ""), chain.activation is not None]
    # The constructor packs a weight that is replaced later: use the smallest one.
    if chain.kind == "Linear":
        op = cls(1, 1)
        op.in_features, op.out_features = head.in_features, head.out_features
        return op
    if subpixel is not None:
        op = cls(1, 1, (1,) * len(subpixel.stride), padding=subpixel.padding)
        op.in_channels, op.out_channels = head.in_channels, head.out_channels * subpixel.phases
        op.kernel_size, op.groups = subpixel.taps, subpixel.groups
        return op
    # The padding of every side, which is symmetric; also resolves padding='same'.
    pads = tuple(head._reversed_padding_repeated_twice[::-2])
    op = cls(1, 1, (1,) * len(pads), stride=head.stride, padding=pads, dilation=head.dilation)
    for name in ("in_channels", "out_channels", "kernel_size", "groups"):
        setattr(op, name, getattr(head, name))
    return op
