"""Layers of the kinds without calibration in plain ops, which every runtime of exported graphs supports."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.errors import ExportError
from qat_lightning.layers.integer import IntegerLayer, WeightGrid
from qat_lightning.layers.integer.dynamic import DynamicLinear
from qat_lightning.layers.integer.plain_dynamic import PlainDynamicLinear
from qat_lightning.layers.integer.weight_only import WeightOnlyEmbedding

Layer = TypeVar("Layer", bound=IntegerLayer)


def plain_integer_layer(module: IntegerLayer, name: str) -> nn.Module:
    """Convert a layer of the kinds without calibration to plain ops.

    Raises:
        ExportError: This type is not supported.
    """
    if isinstance(module, DynamicLinear):
        return QdqDynamicLinear(module)
    if isinstance(module, WeightOnlyEmbedding):
        table = with_class(module, PlainTable) if WeightGrid(*module.grid).packs else module
        return PlainBag(table) if module.mode else table
    if isinstance(module, PlainDynamicLinear) or type(module).__name__.startswith("WeightOnly"):
        return module
    raise not_exportable(module, name)


def not_exportable(layer: IntegerLayer, name: str) -> ExportError:
    """The error for a layer whose kernel no file can hold."""
    return ExportError(
        f"{name!r} is a {type(layer).__name__}, in the kernel {layer.op}, which cannot be exported: keep it float with "
        "exclude=, or save the network with save(path)."
    )


class QdqDynamicLinear(nn.Module):
    """`DynamicLinear` in plain ops: the range of the input is computed in each call.

    Args:
        layer: The layer.
    """

    integers: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, layer: DynamicLinear) -> None:
        super().__init__()
        self.register_buffer("integers", layer.integers)
        self.register_buffer("scales", layer.scales)
        self.register_buffer("zero_points", torch.zeros_like(layer.scales, dtype=torch.int64))
        self.register_buffer("bias", layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Accept any float input of shape ``(..., in_features)``."""
        eps = float(torch.finfo(torch.float32).eps)
        ops = torch.ops.quantized_decomposed
        input = input.float()
        grid = (*ops.choose_qparams.tensor(input, 0, 255, eps, torch.uint8), 0, 255, torch.uint8)
        rounded = ops.dequantize_per_tensor.tensor(ops.quantize_per_tensor.tensor(input, *grid), *grid)
        weight = ops.dequantize_per_channel.default(
            self.integers, self.scales, self.zero_points, 0, -127, 127, torch.int8
        )
        return F.linear(rounded, weight, self.bias)  # type: ignore[arg-type]


class PlainBag(nn.Module):
    """`WeightOnlyEmbedding` for bags of equal size in plain ops; runtimes support few forms of the embedding-bag op.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: WeightOnlyEmbedding) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Compute what the float layer does; bags given by offsets use torch's own op."""
        layer = self.layer
        if input.dim() != 2 or layer.mode not in ("sum", "mean", "max"):
            output: Tensor = layer(input, offsets, per_sample_weights)
            return output
        rows = layer.rows(input.reshape(-1)).reshape(*input.shape, layer.embedding_dim)
        padding = -1 if layer.padding_idx is None else layer.padding_idx
        counted = (input != padding)[..., None]
        if layer.mode == "max":
            largest = rows.masked_fill(~counted, -torch.inf).amax(1)
            return torch.where(counted.any(1), largest, torch.zeros_like(largest))
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[..., None]
        total = (rows * counted).sum(1)
        return total / counted.sum(1).clamp(min=1) if layer.mode == "mean" else total


class PlainTable(WeightOnlyEmbedding):
    """`WeightOnlyEmbedding` with two values per byte, unpacked by division: ONNX export shifts signed integers only."""

    def rows(self, indices: Tensor) -> Tensor:
        """See `WeightOnlyEmbedding.rows`."""
        stored = self.integers.index_select(0, indices).float()
        scales = self.scales.index_select(0, indices)[..., None]
        high = torch.floor(stored / 16)
        values = torch.stack([stored - 16 * high, high], -1).reshape(indices.shape[0], -1)[:, : self.embedding_dim] - 8
        padded = F.pad(values, (0, WeightGrid(*self.grid).padding(self.embedding_dim)))
        values = padded.reshape(indices.shape[0], scales.shape[1], -1)
        if self.zero_points is not None:
            values = values - self.zero_points.index_select(0, indices)[..., None].float()
        return (values * scales).reshape(indices.shape[0], -1)[:, : self.embedding_dim]


def with_class(layer: IntegerLayer, cls: type[Layer]) -> Layer:
    """Return the same layer with the methods of a subclass; tensors are shared."""
    copied: Any = copy.copy(layer)
    copied.__class__ = cls
    made: Layer = copied
    return made
