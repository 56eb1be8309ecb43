"""Tensors as bytes with a table that describes them; quantized tensors as integers with their grid."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat_lightning.artifact.values import decode, encode, no_tag
from qat_lightning.errors import ArtifactError
from qat_lightning.layers.integer.weights import HALF_BYTES, restore, store
from qat_lightning.layers.quantized_tensors import without_deprecation

_ALIGNMENT = 64
_INTEGERS = {"quint8": torch.uint8, "qint8": torch.int8, "qint32": torch.int32}


class TensorWriter:
    """Collects tensors; equal ones are stored once, and int8 values of up to 4 bits two per byte.

    Attributes:
        table: For each tensor its dtype, shape, order of dimensions in memory, and position; ``"packed"`` marks tensors
            with two values per byte.
        data: The bytes of all tensors.
    """

    def __init__(self) -> None:
        self.table: list[dict[str, Any]] = []
        self.data = bytearray()
        self._known: dict[Any, int] = {}

    @property
    def packs(self) -> bool:
        """Whether a tensor has two values per byte, which releases of format 1 cannot read."""
        return any("packed" in entry for entry in self.table)

    def encode(self, value: Any) -> Any:
        """`values.Special` for tensors."""
        if not isinstance(value, Tensor):
            return None
        if value.layout is not torch.strided or value.device.type != "cpu":
            raise ArtifactError(
                f"holds a {value.layout} tensor on {value.device}: only dense tensors on the CPU can be saved"
            )
        value = value.detach()
        return self._quantized(value) if value.is_quantized else {"tensor": self._add(value)}

    def _quantized(self, value: Tensor) -> Any:
        parts: dict[str, Any] = {
            "dtype": str(value.dtype).removeprefix("torch."),
            "integers": self._add(value.int_repr()),
        }
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            parts["axis"] = value.q_per_channel_axis()
            parts["scales"] = self._add(value.q_per_channel_scales())
            parts["zero_points"] = self._add(value.q_per_channel_zero_points())
        elif value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            parts["scale"], parts["zero_point"] = value.q_scale(), value.q_zero_point()
        else:
            raise ArtifactError(f"holds a quantized tensor with {value.qscheme()}, which cannot be saved")
        return {"quantized": parts}

    def _add(self, value: Tensor) -> int:
        # Memory order is kept: a kernel may round differently on channels_last, and the result has to be equal.
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim))
        flat = value.permute(order).contiguous().reshape(-1)
        entry: dict[str, Any] = {"dtype": encode(value.dtype)["dtype"], "shape": list(value.shape), "order": order}
        if _fits_half_bytes(flat):
            flat, entry = store(flat[None], HALF_BYTES)[0], {**entry, "packed": True}
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        key = (hashlib.sha256(raw).digest(), str(entry))
        if key not in self._known:
            self.data.extend(b"\0" * (-len(self.data) % _ALIGNMENT))
            self._known[key] = len(self.table)
            self.table.append({**entry, "start": len(self.data)})
            self.data.extend(raw)
        return self._known[key]


class TensorReader:
    """Returns the tensors that a `TensorWriter` collected.

    Returns a new tensor each time: equal tensors are stored once, and one of them may be modified in place.

    Args:
        table: Table of the writer.
        data: Data of the writer.
    """

    def __init__(self, table: Sequence[dict[str, Any]], data: bytes) -> None:
        self._table = table
        self._data = data

    def decode(self, tag: str, content: Any) -> Any:
        """`values.SpecialTag` for tensors."""
        if tag == "tensor":
            return self._get(content)
        if tag == "quantized":
            return self._quantized(content)
        return no_tag(tag, content)

    def _quantized(self, parts: dict[str, Any]) -> Tensor:
        integers, dtype = self._get(parts["integers"]), parts["dtype"]
        if integers.dtype is not _INTEGERS[dtype]:
            raise ArtifactError(f"a tensor of {dtype} is made of {integers.dtype}")
        if "axis" not in parts:
            scale, zero_point = float(parts["scale"]), int(parts["zero_point"])
            check_grid(scale, zero_point, integers.dtype)
            with without_deprecation():
                whole: Tensor = torch._make_per_tensor_quantized_tensor(integers, scale, zero_point)
            return whole
        scales, zero_points, axis = self._get(parts["scales"]), self._get(parts["zero_points"]), parts["axis"]
        if type(axis) is not int or not 0 <= axis < integers.dim():
            raise ArtifactError("the axis of a quantized tensor is not one of its dimensions")
        if not scales.shape == zero_points.shape == (integers.shape[axis],):
            raise ArtifactError("a quantized tensor has a different number of channels and scales")
        check_grid(scales, zero_points, integers.dtype)
        with without_deprecation():
            made: Tensor = torch._make_per_channel_quantized_tensor(integers, scales, zero_points, axis)
        return made

    def _get(self, index: Any) -> Tensor:
        if type(index) is not int or not 0 <= index < len(self._table):
            raise ArtifactError("there is no tensor with that number")
        return self._make(self._table[index])

    def _make(self, entry: dict[str, Any]) -> Tensor:
        dtype = decode({"dtype": entry["dtype"]})
        shape, order, start = entry["shape"], entry["order"], entry["start"]
        numbers = [*shape, *order, start]
        if any(type(number) is not int or number < 0 for number in numbers) or sorted(order) != list(range(len(shape))):
            raise ArtifactError("the shape of a tensor is impossible")
        if str(dtype).removeprefix("torch.") in _INTEGERS:
            raise ArtifactError(f"{dtype} cannot be stored without a grid")
        count, packed = math.prod(shape), entry.get("packed", False)
        if packed not in (False, True) or (packed and dtype is not torch.int8):
            raise ArtifactError(f"a tensor of {dtype} has two values in a byte, and only those of torch.int8 can")
        size = -(-count // 2) if packed else count * dtype.itemsize
        if start + size > len(self._data):
            raise ArtifactError("a tensor reaches past the end of the data")
        ordered = [shape[dim] for dim in order]
        if not count:
            return torch.empty(ordered, dtype=dtype).permute(_inverse(order))
        raw = bytearray(self._data[start : start + size])
        flat: Tensor = torch.frombuffer(raw, dtype=torch.uint8 if packed else dtype)
        if packed:
            flat = restore(flat[None], count, HALF_BYTES)[0, :count]
        return flat.reshape(ordered).permute(_inverse(order)).clone()


def _fits_half_bytes(flat: Tensor) -> bool:
    """Whether each value fits into 4 bits: true for a weight of up to 4 bits, and false for one that uses 8 bits."""
    if flat.dtype is not torch.int8 or flat.numel() < 2:
        return False
    low, high = (int(end) for end in torch.aminmax(flat))
    return HALF_BYTES.quant_min <= low and high <= HALF_BYTES.quant_max


def check_grid(scale: float | Tensor, zero_point: int | Tensor, integers: torch.dtype) -> None:
    """Check that scales and zero points are valid, because kernels do not check them.

    Args:
        scale: A single one, or one per channel.
        zero_point: The same number; those of embeddings are floats, and may have any value.
        integers: Dtype of the stored integers.

    Raises:
        ArtifactError: A scale is negative, infinite or NaN, or a zero point is out of range.
    """
    scales, zero_points = torch.as_tensor(scale, dtype=torch.float64), torch.as_tensor(zero_point)
    if not bool(((scales >= 0) & scales.isfinite()).all()):
        raise ArtifactError("it holds integers with a scale that is negative, infinite or NaN")
    if zero_points.dtype.is_floating_point:
        possible = zero_points.isfinite()
    else:
        limits = torch.iinfo(integers)
        possible = (zero_points >= limits.min) & (zero_points <= limits.max)
    if not bool(possible.all()):
        raise ArtifactError("it holds integers with a zero point outside of their range")


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]
