"""Weight-only quantization: weights are stored as integers and dequantized for float kernels."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qat_lightning.layers.integer.integer_layer import IntegerLayer
from qat_lightning.layers.integer.weights import (
    WeightGrid,
    dequantize_rows,
    quantize_rows,
    store,
    transposed_groups,
    weight_of_rows,
    weight_rows,
)


class WeightOnly(IntegerLayer):
    """A layer of ``torch.nn`` whose weights are stored as integers, and dequantized for each call.

    Args:
        layer: The float layer; its parameters are taken out.
        weights: Names of the parameters to round.
        grid: The grid.
        shares: Shares for `quantize_rows`, by the names of the weights.

    Attributes:
        layer: The float layer without these parameters.
        shapes: Shapes of the rounded parameters.
        grid: The grid.
        transposed_groups: See the function of this name.
    """

    dequantizes = True

    def __init__(
        self,
        layer: nn.Module,
        weights: Sequence[str],
        grid: WeightGrid,
        shares: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.transposed_groups = transposed_groups(layer)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in weights:
            weight = layer.get_parameter(name)
            self.shapes[name] = tuple(weight.shape)
            rows = weight_rows(weight, self.transposed_groups)
            integers, scales, zero_points = quantize_rows(rows, grid, (shares or {}).get(name))
            self._hold(name, store(integers, grid), scales, None if grid.symmetric else zero_points)
            holder, _, leaf = name.rpartition(".")
            layer.get_submodule(holder)._parameters[leaf] = None
        self.layer = layer.eval().requires_grad_(False)
        _forget_flat_weights(layer)

    @classmethod
    def shell(cls, layer: nn.Module, grid: WeightGrid) -> WeightOnly:
        """The same without tensors: for a layer on ``meta``, into which a ``state_dict`` is loaded."""
        shell = cls(layer, weights_of(layer), dataclasses.replace(grid, clipped=False))
        shell.grid = grid
        return shell

    def _hold(self, name: str, stored: Tensor, scales: Tensor, zero_points: Tensor | None) -> None:
        key = self._key(name)
        self.register_buffer(f"{key}_integers", stored)
        self.register_buffer(f"{key}_scales", scales)
        self.register_buffer(f"{key}_zero_points", zero_points)

    def _key(self, name: str) -> str:
        # A square weight has the same shape in either order of dimensions, so the name of the buffer tells them apart.
        return name.replace(".", "_") + ("_by_output" if self.transposed_groups else "")

    @property
    def op(self) -> str:  # type: ignore[override]
        """The layer that runs."""
        return f"{type(self.layer).__name__} on dequantized weights"

    def dequantized(self, name: str) -> Tensor:
        """The float32 weight that the integers of a parameter represent."""
        key, shape = self._key(name), self.shapes[name]
        parts = (self._buffers[f"{key}_{part}"] for part in ("integers", "scales", "zero_points"))
        stored, scales, zero_points = parts
        assert stored is not None
        assert scales is not None
        values = math.prod(shape) // stored.shape[0]
        rows = dequantize_rows(stored, scales, zero_points, values, self.grid)
        return weight_of_rows(rows, shape, self.transposed_groups)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same as the float layer."""
        weights = {name: self.dequantized(name) for name in self.shapes}
        return _call_with(self.layer, weights, args, kwargs)

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The float layer with the dequantized weights, in float64."""
        layer = copy.deepcopy(self.layer).double()
        weights = {name: self.dequantized(name).double() for name in self.shapes}
        args, kwargs = tree_map(_to_double, (args, kwargs))
        return _call_with(layer, weights, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """The attributes of the float layer: its sizes, and its dequantized weights."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "layer" not in self.__dict__.get("_modules", {}):
                raise
            return self.dequantized(name) if name in self.shapes else getattr(self.layer, name)


class WeightOnlyEmbedding(IntegerLayer):
    """``nn.Embedding`` or ``nn.EmbeddingBag`` whose table is stored as integers; only looked-up rows are dequantized.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Size of a row.
        padding_idx: The row that a bag leaves out.
        mode: ``""`` for ``nn.Embedding``; ``"sum"``, ``"mean"`` or ``"max"`` for a bag.
        include_last_offset: See ``nn.EmbeddingBag``.
        grid: The grid as the values of a `WeightGrid`.
    """

    dequantizes = True

    integers: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        mode: str = "",
        include_last_offset: bool = False,
        grid: tuple[Any, ...] = (-127, 127, True, 0, False),
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.mode, self.include_last_offset, self.grid = mode, include_last_offset, tuple(grid)
        made = WeightGrid(*self.grid)
        integers, scales = made.empty(num_embeddings, embedding_dim)
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)
        points = None if made.symmetric else torch.zeros_like(scales, dtype=torch.int8)
        self.register_buffer("zero_points", points)

    @classmethod
    def empty(cls, table: nn.Embedding | nn.EmbeddingBag, grid: WeightGrid) -> WeightOnlyEmbedding:
        """Create one with the sizes of a float table, its integers not yet set."""
        values = (grid.quant_min, grid.quant_max, grid.symmetric, grid.group, grid.clipped)
        mode, last = (table.mode, table.include_last_offset) if isinstance(table, nn.EmbeddingBag) else ("", False)
        return cls(table.num_embeddings, table.embedding_dim, table.padding_idx, mode, last, values)

    @classmethod
    def of(
        cls, table: nn.Embedding | nn.EmbeddingBag, grid: WeightGrid, share: Tensor | None = None
    ) -> WeightOnlyEmbedding:
        """Quantize a table; ``share`` is passed to `quantize_rows`."""
        made = cls.empty(table, grid)
        integers, made.scales, zero_points = quantize_rows(table.weight, grid, share)
        made.integers = store(integers, grid)
        made.zero_points = None if grid.symmetric else zero_points
        return made

    @property
    def op(self) -> str:  # type: ignore[override]
        """The kernel that runs."""
        return "embedding_bag on dequantized rows" if self.mode else "embedding on dequantized rows"

    @property
    def weight(self) -> Tensor:
        """The table that the integers represent, float32."""
        return self.table()

    def table(self) -> Tensor:
        """`weight` as a method, which a graph can call."""
        return dequantize_rows(self.integers, self.scales, self.zero_points, self.embedding_dim, WeightGrid(*self.grid))

    def rows(self, indices: Tensor) -> Tensor:
        """The float32 rows at one-dimensional indices."""
        # index_select refuses invalid rows, while plain indexing accepts negative numbers.
        parts = (self.integers, self.scales, self.zero_points)
        chosen = [None if part is None else part.index_select(0, indices) for part in parts]
        assert chosen[0] is not None
        assert chosen[1] is not None
        return dequantize_rows(chosen[0], chosen[1], chosen[2], self.embedding_dim, WeightGrid(*self.grid))

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Same as the float layer: indices of any shape, or bags."""
        if not self.mode:
            return self.rows(input.reshape(-1)).reshape(*input.shape, self.embedding_dim)
        # One row per index and one for the padding, so that no size depends on values, which a trace would fix.
        rows = self.rows(input.reshape(-1))
        places = torch.arange(rows.shape[0], device=rows.device).reshape(input.shape)
        padding = None
        if self.padding_idx is not None:
            padding = rows.shape[0]
            places = torch.where(input == self.padding_idx, padding, places)
            rows = torch.cat([rows, rows.new_zeros(1, self.embedding_dim)])
        return F.embedding_bag(
            places,
            rows,
            None if offsets is None else offsets.to(torch.int64),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )

    def reference(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """The float layer with the dequantized table, in float64."""
        table = self.weight.double()
        if not self.mode:
            return F.embedding(input, table)
        weights = None if per_sample_weights is None else per_sample_weights.double()
        return F.embedding_bag(
            input.to(torch.int64),
            table,
            None if offsets is None else offsets.to(torch.int64),
            mode=self.mode,
            per_sample_weights=weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return f"{self.num_embeddings}, {self.embedding_dim}" + (f", mode={self.mode}" if self.mode else "")


def weights_of(module: nn.Module) -> list[str]:
    """The parameters of a layer that are weights: those with two or more dimensions.

    Example:
        >>> weights_of(nn.MultiheadAttention(4, 2))
        ['in_proj_weight', 'out_proj.weight']
    """
    names = [name for name, parameter in module.named_parameters() if parameter.dim() > 1]
    # The learned positions of attention are activations rather than weights.
    return [name for name in names if name not in ("bias_k", "bias_v")]


def _to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _call_with(layer: nn.Module, weights: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    # Not by torch.func.functional_call, which refuses to be traced by TorchScript.
    places = {
        name: (layer.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2]) for name in weights
    }
    try:
        for name, (parameters, leaf) in places.items():
            parameters[leaf] = weights[name]  # type: ignore[assignment]
        _forget_flat_weights(layer)
        return layer(*args, **kwargs)
    finally:
        for parameters, leaf in places.values():
            parameters[leaf] = None
        _forget_flat_weights(layer)


def _forget_flat_weights(layer: nn.Module) -> None:
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()
