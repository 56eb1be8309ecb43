"""Encoding weights packed for a quantized engine as plain tensors; decoding packs them for the current engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from qat_lightning.artifact.tensors import TensorReader, TensorWriter, check_grid
from qat_lightning.artifact.values import decode, encode
from qat_lightning.errors import ArtifactError
from qat_lightning.layers.kernels import PACKED, kind_of_packed

_CONVOLUTIONS: dict[str, Any] = {
    "Conv1d": nnq.Conv1d,
    "Conv2d": nnq.Conv2d,
    "Conv3d": nnq.Conv3d,
    "ConvReLU1d": nniq.ConvReLU1d,
    "ConvReLU2d": nniq.ConvReLU2d,
    "ConvReLU3d": nniq.ConvReLU3d,
    "ConvAdd2d": nniq.ConvAdd2d,
    "ConvAddReLU2d": nniq.ConvAddReLU2d,
}
_TRANSPOSED: dict[str, Any] = {
    "ConvTranspose1d": nnq.ConvTranspose1d,
    "ConvTranspose2d": nnq.ConvTranspose2d,
    "ConvTranspose3d": nnq.ConvTranspose3d,
}
_LINEAR: dict[str, Any] = {
    "Linear": nnq.Linear,
    "LinearReLU": nniq.LinearReLU,
    "LinearLeakyReLU": nniq.LinearLeakyReLU,
    "LinearTanh": nniq.LinearTanh,
}
_CLASSES: dict[str, Any] = {**_CONVOLUTIONS, **_TRANSPOSED, **_LINEAR}
_NAMES = {layer: name for name, layer in _CLASSES.items()}
_SIZES = {"stride": 1, "padding": 0, "dilation": 1}
"""The parameters of a convolution, and the smallest valid value of each."""


def is_packed_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's layers with a packed weight."""
    return type(module) in _NAMES


def encode_packed_layer(module: Any, tensors: TensorWriter) -> dict[str, Any]:
    """Encode a layer as its weight, its bias and its numbers."""
    kind = _NAMES[type(module)]
    numbers: dict[str, Any] = {"scale": float(module.scale), "zero_point": int(module.zero_point)}
    if kind == "LinearLeakyReLU":
        numbers["negative_slope"] = float(module.negative_slope)
    if kind not in _LINEAR:
        numbers["groups"], numbers["padding_mode"] = module.groups, module.padding_mode
        for name in (*_SIZES, *(("output_padding",) if kind in _TRANSPOSED else ())):
            numbers[name] = tuple(getattr(module, name))
    try:
        weight, bias = module.weight(), module.bias()
    except RuntimeError as error:
        # QNNPACK packs 3-d convolutions, but does not return their weights.
        raise ArtifactError(
            f"holds a {kind} whose packed weight cannot be read ({error}): keep it float with exclude="
        ) from error
    return {
        "class": kind,
        "numbers": {name: encode(value) for name, value in numbers.items()},
        "weight": encode(weight, tensors.encode),
        "bias": encode(bias, tensors.encode),
    }


def decode_packed_layer(data: dict[str, Any], tensors: TensorReader) -> nn.Module:
    """Inverse of `encode_packed_layer`."""
    kind = data["class"]
    if kind not in _CLASSES:
        raise ArtifactError(f"it holds a {str(kind)[:80]!r}, which is not a layer with a packed weight")
    numbers = {name: decode(value) for name, value in data["numbers"].items()}
    weight, bias = decode(data["weight"], tensors.decode), decode(data["bias"], tensors.decode)
    scale, zero_point = float(numbers.pop("scale")), int(numbers.pop("zero_point"))
    check_grid(scale, zero_point, torch.uint8)
    _check_tensors(weight, bias, 2 if kind in _LINEAR else int(kind[-2]) + 2, transposed=kind in _TRANSPOSED)
    # The constructors pack a weight that is replaced later: use the smallest one.
    if kind in _LINEAR:
        layer = _CLASSES[kind](1, 1, **_slope(kind, numbers))
        layer.out_features, layer.in_features = weight.shape
    else:
        layer = _convolution(kind, numbers, weight)
    layer.set_weight_bias(weight, bias)
    layer.scale, layer.zero_point = scale, zero_point
    made: nn.Module = layer
    return made


def _slope(kind: str, numbers: dict[str, Any]) -> dict[str, float]:
    return {"negative_slope": float(numbers["negative_slope"])} if kind == "LinearLeakyReLU" else {}


def _convolution(kind: str, numbers: dict[str, Any], weight: Any) -> Any:
    groups, padding_mode = _groups(numbers["groups"], weight), str(numbers["padding_mode"])
    sizes = {name: _size(numbers[name], weight, least) for name, least in _SIZES.items()}
    if kind in _TRANSPOSED:
        first, second = weight.shape[0], weight.shape[1] * groups
        sizes["output_padding"] = _size(numbers["output_padding"], weight, 0)
    else:
        first, second = weight.shape[1] * groups, weight.shape[0]
    kernel = tuple(weight.shape[2:])
    layer = _CLASSES[kind](1, 1, (1,) * len(kernel), padding_mode=padding_mode, **sizes)
    layer.in_channels, layer.out_channels, layer.kernel_size, layer.groups = first, second, kernel, groups
    return layer


def _check_tensors(weight: Any, bias: Any, dims: int, *, transposed: bool = False) -> None:
    """Raise an error unless a kernel can safely use these tensors, because kernels do not check."""
    if not isinstance(weight, Tensor) or weight.dtype is not torch.qint8 or weight.dim() != dims or not weight.numel():
        raise ArtifactError("it holds a layer whose int8 weight is missing or has the wrong dimensions")
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.dtype is not torch.float32 or bias.dim() != 1:
        raise ArtifactError("it holds a layer whose bias is not a row of float32")
    if not transposed and bias.shape[0] != weight.shape[0]:
        raise ArtifactError("it holds a layer whose number of biases differs from its number of outputs")


def _groups(value: Any, weight: Tensor) -> int:
    if type(value) is not int or not 1 <= value <= weight.shape[0] or weight.shape[0] % value:
        raise ArtifactError(f"it holds a convolution of {weight.shape[0]} channels in {str(value)[:20]} groups")
    return value


def _size(value: Any, weight: Tensor, least: int) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(part) is int and least <= part < 2**31 for part in value):
        raise ArtifactError("it holds a convolution with an impossible stride, padding or dilation")
    if len(value) != weight.dim() - 2:
        raise ArtifactError(
            "it holds a convolution whose stride, padding or dilation has the wrong number of dimensions"
        )
    return value


def encode_packed(value: Any, tensors: TensorWriter) -> dict[str, Any]:
    """Encode a packed weight as its weight, its bias and its parameters."""
    kind = kind_of_packed(value)
    numbers: dict[str, Any] = {}
    if kind == "LinearPackedParamsBase":
        weight, bias = torch.ops.quantized.linear_unpack(value)
    else:
        weight, bias = value.unpack()
        numbers = {name: tuple(getattr(value, name)()) for name in _SIZES} | {"groups": int(value.groups())}
        if value.transpose():
            raise ArtifactError("holds a packed weight of a transposed convolution, which is not supported")
    return {
        "kind": kind,
        "numbers": {name: encode(number) for name, number in numbers.items()},
        "weight": encode(weight, tensors.encode),
        "bias": encode(bias, tensors.encode),
    }


def decode_packed(data: dict[str, Any], tensors: TensorReader) -> Any:
    """Inverse of `encode_packed`."""
    weight, bias = decode(data["weight"], tensors.decode), decode(data["bias"], tensors.decode)
    kind = data["kind"]
    if kind not in PACKED:
        raise ArtifactError(f"it holds a {str(kind)[:80]!r}, which is not a packed weight")
    _check_tensors(weight, bias, 2 if kind == "LinearPackedParamsBase" else int(kind[4]) + 2)
    if kind == "LinearPackedParamsBase":
        return torch.ops.quantized.linear_prepack(weight, bias)
    numbers = {name: decode(value) for name, value in data["numbers"].items()}
    pack = {
        "Conv2dPackedParamsBase": torch.ops.quantized.conv2d_prepack,
        "Conv3dPackedParamsBase": torch.ops.quantized.conv3d_prepack,
    }[kind]
    sizes = (list(_size(numbers[name], weight, least)) for name, least in _SIZES.items())
    return pack(weight, bias, *sizes, _groups(numbers["groups"], weight))
