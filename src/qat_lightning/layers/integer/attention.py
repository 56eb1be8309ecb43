"""``nn.MultiheadAttention`` with int8 weights and dynamic activations in its four linear maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.layers.integer.dynamic import DynamicLinear
from qat_lightning.layers.integer.integer_layer import IntegerLayer
from qat_lightning.layers.integer.weights import WeightGrid


class DynamicAttention(IntegerLayer):
    """Attention of Vaswani et al., 2017; the products of queries, keys and values stay float.

    Args:
        embed_dim: Size of a query and of an output.
        num_heads: Heads.
        kdim: Size of a key.
        vdim: Size of a value.
        bias: Whether the linear maps have biases.
        batch_first: Whether the batch is the first dimension.
        engine: The quantized engine.
    """

    op = "quantized::linear_dynamic"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kdim: int,
        vdim: int,
        bias: bool = True,
        batch_first: bool = False,
        engine: str = "onednn",
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"{embed_dim} features cannot be split into {num_heads} heads")
        self.embed_dim, self.num_heads, self.kdim, self.vdim = embed_dim, num_heads, kdim, vdim
        self.bias, self.batch_first, self.engine = bias, batch_first, engine
        self.query = DynamicLinear(embed_dim, embed_dim, bias, engine)
        self.key = DynamicLinear(kdim, embed_dim, bias, engine)
        self.value = DynamicLinear(vdim, embed_dim, bias, engine)
        self.out = DynamicLinear(embed_dim, embed_dim, bias, engine)

    @classmethod
    def of(
        cls, layer: nn.MultiheadAttention, grid: WeightGrid, engine: str, shares: Mapping[str, Tensor] | None = None
    ) -> DynamicAttention:
        """Quantize the weights of a layer without ``add_bias_kv`` and ``add_zero_attn``.

        Args:
            layer: The layer.
            grid: Grid of the weights.
            engine: The quantized engine.
            shares: Shares for `quantize_rows`, by the names of `linear_maps`.
        """
        bias = layer.in_proj_bias
        made = cls(
            layer.embed_dim, layer.num_heads, layer.kdim, layer.vdim, bias is not None, layer.batch_first, engine
        )
        for name, (weight, part) in linear_maps(layer).items():
            setattr(made, name, DynamicLinear.of(weight, part, grid, engine, (shares or {}).get(name)))
        return made

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Torch's transformer layers read this to select a code path."""
        return self.query.bias

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.kdim == self.vdim == self.embed_dim

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
        """Same as ``nn.MultiheadAttention``."""
        linear = (self.query, self.key, self.value, self.out)
        masks = (key_padding_mask, attn_mask, is_causal)
        return attend(
            (query, key, value),
            linear,
            masks,
            self.num_heads,
            batch_first=self.batch_first,
            shown="none" if not need_weights else "mean" if average_attn_weights else "all",
        )

    def reference(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        """The same computation in float64."""
        linear = tuple(part.reference for part in (self.query, self.key, self.value, self.out))
        masks = (key_padding_mask, attn_mask, is_causal)
        return attend((query, key, value), linear, masks, self.num_heads, batch_first=self.batch_first)[0]

    def extra_repr(self) -> str:
        """Sizes and engine, for ``print``."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, engine={self.engine}"


def linear_maps(layer: nn.MultiheadAttention) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of the four linear maps of attention, as views of the layer's parameters."""
    separate = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    weights = separate if layer.in_proj_weight is None else layer.in_proj_weight.chunk(3)
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    maps = dict(zip(("query", "key", "value"), zip(weights, biases, strict=True), strict=True))
    return {**maps, "out": (layer.out_proj.weight, layer.out_proj.bias)}


def attend(
    inputs: Any,
    linear: Any,
    masks: tuple[Tensor | None, Tensor | None, bool],
    num_heads: int,
    *,
    batch_first: bool,
    shown: Literal["none", "mean", "all"] = "none",
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """The computation of ``nn.MultiheadAttention``, with the given linear maps.

    Args:
        inputs: Query, key and value.
        linear: The maps of these three, and that of the output.
        masks: ``key_padding_mask``, ``attn_mask`` and ``is_causal``.
        num_heads: Heads.
        batch_first: Whether the batch is the first dimension.
        shown: Which attention weights are returned beside the output.
        dropout: Share of the attention weights that is dropped.
    """
    batched = inputs[0].dim() == 3
    if not batched:
        inputs = tuple(part.unsqueeze(0) for part in inputs)
    elif not batch_first:
        inputs = tuple(part.transpose(0, 1) for part in inputs)
    projected = [run(part) for run, part in zip(linear[:3], inputs, strict=True)]
    # (batch, heads, positions, size of a head)
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in projected)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = _both_masks(scores, num_heads, *masks)
    # If all keys of a query are masked, the float layer returns NaN, which has no range: here it is 0.
    weights = torch._safe_softmax(scores if mask is None else scores + mask, -1)
    weights = F.dropout(weights, dropout) if dropout else weights
    output = linear[3]((weights @ v).transpose(1, 2).flatten(2))
    found = None
    if shown != "none":
        found = weights.mean(1) if shown == "mean" else weights
        found = found if batched else found[0]
    if not batched:
        return output[0], found
    return output if batch_first else output.transpose(0, 1), found


def _both_masks(
    scores: Tensor, num_heads: int, padding: Tensor | None, mask: Tensor | None, causal: bool
) -> Tensor | None:
    """Merge both masks into one that is added to the scores."""
    if causal and mask is None:
        raise RuntimeError("is_causal=True needs attn_mask, as in nn.MultiheadAttention.")
    parts = []
    if mask is not None:
        added = _additive(mask, scores)
        parts.append(added.unflatten(0, (-1, num_heads)) if added.dim() == 3 else added)
    if padding is not None:
        padding = padding if padding.dim() == 2 else padding[None]
        parts.append(_additive(padding, scores)[:, None, None])
    return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    converted = F._canonical_mask(
        mask, "mask", other_type=None, other_name="", target_type=scores.dtype, check_other=False
    )
    assert converted is not None
    return converted.to(scores.dtype)
