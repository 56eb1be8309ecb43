"""Layers that train with exactly the rounding of the integer layers they become: kinds dynamic and weight_only.

A layer stays the same object with the same parameters; only its class changes. Its weight is rounded by the arithmetic
of `qat_lightning.layers.integer.weights`, so that the integers of the trained layer represent the values it trained
with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.layers.integer.attention import attend, linear_maps
from qat_lightning.layers.integer.dynamic import name_of_cell, step_of_cell
from qat_lightning.layers.integer.weight_only import weights_of
from qat_lightning.layers.integer.weights import WeightGrid, transposed_groups, weight_of_rows, weight_rows
from qat_lightning.layers.operators import WEIGHTED, module_types
from qat_lightning.numerics.dynamic_fake_quantize import DynamicFakeQuantize
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe

ACTIVATION = "activation_fake_quant"


class RoundedLayer(nn.Module):
    """Base class of rounded layers; created by `round_layer` and not by the constructor."""

    weight_grid: WeightGrid

    def roundings(self) -> list[FakeQuantize | DynamicFakeQuantize]:
        """The modules that round its weights, and its activations in each call."""
        return [part for part in self.children() if isinstance(part, (FakeQuantize, DynamicFakeQuantize))]

    def rounds(self) -> bool:
        """Whether anything in this layer is rounded now."""
        return any(part.fake_quant_enabled and not part.left_float for part in self.roundings())

    def leave_float(self) -> None:
        """Never round anything in this layer."""
        for part in self.roundings():
            part.left_float = True

    def parts(self) -> Mapping[str, Tensor]:
        """The rounded weights, by name."""
        raise NotImplementedError

    def rounded(self, name: str, weight: Tensor) -> Tensor:
        """A weight as its integers represent it; unchanged before fake-quantization is enabled."""
        fq = self.fake_quantize(name)
        if not fq.fake_quant_enabled or fq.left_float:
            return weight
        return self.of_ranges(fq(self.in_ranges(weight)), weight)

    def in_ranges(self, weight: Tensor) -> Tensor:
        """A weight as its grid sees it: one row per range, padded with zeros."""
        return self._ranges(weight_rows(weight, transposed_groups(self)))

    def of_ranges(self, ranges: Tensor, weight: Tensor) -> Tensor:
        """Inverse of `in_ranges`, in the shape of a weight."""
        groups = transposed_groups(self)
        rows, *_ = weight_rows(weight, groups).shape
        values = weight.numel() // rows
        return weight_of_rows(ranges.reshape(rows, -1)[:, :values], weight.shape, groups)

    @torch.no_grad()
    def materialize(self) -> None:
        """Create the per-range state of clipped grids, before training begins."""
        for name, weight in self.parts().items():
            self.fake_quantize(name).materialize(self.in_ranges(weight))

    def shares(self) -> dict[str, Tensor]:
        """The shares of the ranges that clipped grids represent, as far as they are chosen."""
        found = {name: self.fake_quantize(name)._buffers.get("clip") for name in self.parts()}
        return {name: share for name, share in found.items() if share is not None and bool(share.all())}

    def _ranges(self, rows: Tensor) -> Tensor:
        """One row per range, padded with zeros."""
        group = self.weight_grid.group
        return F.pad(rows, (0, -rows.shape[1] % group)).reshape(-1, group) if group > 0 else rows

    def fake_quantize(self, name: str) -> FakeQuantize:
        """The FakeQuantize of one of its `parts`."""
        return cast("FakeQuantize", self._modules[_child(name)])


def _child(name: str) -> str:
    return f"{name.replace('.', '_')}_fake_quant"


class _RoundedWeights(RoundedLayer):
    """Any layer whose own ``forward`` can run with rounded weights."""

    def parts(self) -> Mapping[str, Tensor]:
        return {name: cast("Tensor", attrgetter(name)(self)) for name in weights_of(self)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same as the float layer."""
        if not self.rounds():
            return super().forward(*args, **kwargs)
        with self._in_place({name: self.rounded(name, weight) for name, weight in self.parts().items()}):
            return super().forward(*args, **kwargs)

    @contextmanager
    def _in_place(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The rounded weights where the layer's forward looks for its parameters."""
        kept = [(*self._holder(name), attrgetter(name)(self)) for name in weights]
        flat = self.__dict__.get("_flat_weights")
        try:
            for (holder, leaf, _), weight in zip(kept, weights.values(), strict=True):
                holder._parameters[leaf] = weight  # type: ignore[assignment]
            if flat is not None:  # recurrent layers read their weights from a list of their own
                self._flat_weights = [
                    weights.get(name, getattr(self, name)) for name in cast("Any", self)._flat_weights_names
                ]
            yield
        finally:
            for holder, leaf, parameter in kept:
                holder._parameters[leaf] = parameter
            if flat is not None:
                self._flat_weights = flat

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        holder, _, leaf = name.rpartition(".")
        return self.get_submodule(holder), leaf


class _RoundedWeight(RoundedLayer):
    """A layer with one weight, in a form that can be compiled."""

    def parts(self) -> Mapping[str, Tensor]:
        return {"weight": cast("Tensor", self.weight)}

    def _now(self) -> Tensor:
        return self.rounded("weight", cast("Tensor", self.weight))


class _RoundedConvolution(_RoundedWeight):
    def forward(self, input: Tensor) -> Tensor:
        """Same as the float layer."""
        result: Tensor = self._conv_forward(input, self._now(), self.bias)  # type: ignore[operator]
        return result


class RoundedLinear(_RoundedWeight, nn.Linear):
    """``nn.Linear`` with a rounded weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Same as the float layer."""
        return F.linear(input, self._now(), self.bias)


class DynamicallyRoundedLinear(_RoundedWeight, nn.Linear):
    """``nn.Linear`` with a rounded weight, and activations rounded to the range of each call."""

    def forward(self, input: Tensor) -> Tensor:
        """Same as the float layer."""
        return F.linear(self._modules[ACTIVATION](input), self._now(), self.bias)  # type: ignore[misc]


class DynamicallyRoundedAttention(RoundedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose four linear maps are rounded; their products stay float."""

    def parts(self) -> Mapping[str, Tensor]:
        """The four linear maps."""
        return {name: weight for name, (weight, _) in linear_maps(self).items()}

    def shares(self) -> dict[str, Tensor]:
        """Also by parameter names, for graphs that contain the parameters and not the linear maps."""
        found = super().shares()
        rows = [found[name] for name in ("query", "key", "value") if name in found]
        if len(rows) == 3 and self.in_proj_weight is not None and rows[0].dim():
            found["in_proj_weight"] = torch.cat(rows)
        if "out" in found:
            found["out_proj.weight"] = found["out"]
        return found

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Same as the float layer."""
        if not self.rounds():
            plain: tuple[Tensor, Tensor | None] = super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return plain
        activation = cast("DynamicFakeQuantize", self._modules[ACTIVATION])

        def rounded(name: str, weight: Tensor, bias: Tensor | None) -> Any:
            return lambda x: F.linear(activation(x), self.rounded(name, weight), bias)

        return attend(
            (query, key, value),
            [rounded(name, *parts) for name, parts in linear_maps(self).items()],
            (key_padding_mask, attn_mask, is_causal),
            self.num_heads,
            batch_first=self.batch_first,
            shown="none" if not need_weights else "mean" if average_attn_weights else "all",
            dropout=self.dropout if self.training else 0.0,
        )


class _DynamicallyRoundedCell(RoundedLayer):
    def parts(self) -> Mapping[str, Tensor]:
        return {"weight_ih": cast("Tensor", self.weight_ih), "weight_hh": cast("Tensor", self.weight_hh)}

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Same as the float layer."""
        if not self.rounds():
            return super().forward(input, hx)
        activation = cast("DynamicFakeQuantize", self._modules[ACTIVATION])

        def rounded(name: str) -> Any:
            weight, bias = getattr(self, f"weight_{name}"), getattr(self, f"bias_{name}") if self.bias else None
            return lambda x: F.linear(activation(x), self.rounded(f"weight_{name}", weight), bias)

        cell = cast("Any", self)
        return step_of_cell(cell.rounded_as, cell.hidden_size, input, hx, (rounded("ih"), rounded("hh")))


def _of(base: type[nn.Module], float_type: type[nn.Module], prefix: str = "Rounded") -> type[nn.Module]:
    """Create the class of a rounded layer as an attribute of this module, so that it can be pickled."""
    name = f"{prefix}{float_type.__name__}"
    made = type(
        name, (base, float_type), {"__module__": __name__, "__doc__": f"``nn.{float_type.__name__}``, rounded."}
    )
    globals()[name] = made
    return made


_WEIGHT_ONLY: dict[type[nn.Module], type[nn.Module]] = {
    **{float_type: _of(_RoundedWeights, float_type) for float_type in WEIGHTED},
    **{float_type: _of(_RoundedConvolution, float_type) for float_type in module_types("convolution")},
    nn.Linear: RoundedLinear,
}
_DYNAMIC: dict[type[nn.Module], type[nn.Module]] = {
    **{float_type: _WEIGHT_ONLY[float_type] for float_type in module_types("table")},
    **{float_type: _of(_DynamicallyRoundedCell, float_type, "Dynamically") for float_type in module_types("cell")},
    nn.Linear: DynamicallyRoundedLinear,
    nn.MultiheadAttention: DynamicallyRoundedAttention,
}


def round_layer(layer: nn.Module, recipe: Recipe) -> None:
    """Let a float layer train with the rounding of its integer layer; `why_not` has to return no reason for it.

    Args:
        layer: Changed in place; it keeps its parameters and their names.
        recipe: A recipe of kind ``"dynamic"`` or ``"weight_only"``.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> round_layer(layer, Recipe("eager", "x86", kind="weight_only", trained=True))
        >>> type(layer).__name__, sorted(name for name, _ in layer.named_parameters())
        ('RoundedLinear', ['bias', 'weight'])
    """
    if type(layer) in module_types("cell"):
        layer.__dict__["rounded_as"] = name_of_cell(cast("nn.RNNCellBase", layer))
    round_as(layer, (_DYNAMIC if recipe.kind == "dynamic" else _WEIGHT_ONLY)[type(layer)], recipe)


def round_as(layer: nn.Module, rounded_type: type[nn.Module], recipe: Recipe) -> None:
    """`round_layer` with a given class."""
    grid = WeightGrid.of(recipe)
    layer.__class__ = rounded_type
    rounded = cast("RoundedLayer", layer)
    rounded.__dict__["weight_grid"] = grid
    for name in rounded.parts():
        rounded.add_module(_child(name), _weight_fake_quantize(grid))
    # The input of an embedding is indices, also with adapters.
    if recipe.kind == "dynamic" and not isinstance(getattr(layer, "base_layer", layer), module_types("table")):
        scheme = recipe.scheme
        made = DynamicFakeQuantize(scheme.activation_granularity, symmetric=scheme.activation_symmetric)
        rounded.add_module(ACTIVATION, made)


def _weight_fake_quantize(grid: WeightGrid) -> FakeQuantize:
    whole = grid.group < 0
    affine = (torch.per_channel_affine, torch.per_tensor_affine)[whole]
    symmetric = (torch.per_channel_symmetric, torch.per_tensor_symmetric)[whole]
    return FakeQuantize(
        dtype=torch.int8,
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        qscheme=symmetric if grid.symmetric else affine,
        ch_axis=-1 if whole else 0,
        source="present",
        clipped=grid.clipped,
    )
