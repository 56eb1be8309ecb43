"""Torch's attention and transformer layers in plain ops that can be quantized, with the same parameters and names.

``nn.MultiheadAttention`` is a single function that reads the weights of its four linear maps, and
``nn.TransformerEncoder`` has a fast path that is a single kernel. Where a mode can quantize more, the modules are
switched to these classes, and stay the same objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import handle_torch_function, has_torch_function


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights.

    Args:
        query: ``(…, positions, size of a head)``.
        key: ``(…, positions of keys, size of a head)``.
        value: ``(…, positions of keys, size of a head)``.
        mask: Added to the scores; in a boolean mask, True means that a position takes part.
        dropout_p: Dropout probability of the weights.

    Returns:
        The output, and the attention weights.
    """
    if has_torch_function((query, key, value)):
        given = (query, key, value)
        found: tuple[Tensor, Tensor] = handle_torch_function(attend, given, query, key, value, mask, dropout_p)
        return found
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.softmax(-1), dropout_p)
    return weights @ value, weights


class PositionsFirst(nn.Module):
    """Lays out the output of attention in memory as ``nn.MultiheadAttention(batch_first=True)`` does, in training.

    There torch returns a transposed tensor, and on the CPU dropout draws its mask in the order of memory. With the same
    order, masks are those of the float network for the same seed.
    """

    def forward(self, output: Tensor) -> Tensor:
        """The same values, ``(samples, positions, features)``, with positions before samples in memory."""
        if not self.training or output.dim() != 3:
            return output
        return output.transpose(0, 1).contiguous().transpose(0, 1)


class WrittenAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` in plain ops; its linear maps are functions of slices of its parameters."""

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
        """Same as ``nn.MultiheadAttention``; if all keys of a query are masked, its weights are 0, not NaN."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True needs attn_mask, as in nn.MultiheadAttention.")
        batched = query.dim() == 3
        q, k, v = (self._heads(part, batched) for part in self.projected(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, batched)
        k, v, mask = self._with_positions(k, v, mask)
        dropout_p, weights = (self.dropout if self.training else 0.0), None
        if need_weights:
            both = attend(q, k, v, mask, dropout_p)
            mixed, weights = both[0], both[1]
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        return self.out_proj(self._joined(mixed, batched)), weights

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value after their linear maps; a single product where all three inputs are the same tensor."""
        size, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            packed = F.linear(query, weight, bias)
            return packed[..., :size], packed[..., size : 2 * size], packed[..., 2 * size :]
        inputs = enumerate((query, key, value))
        q, k, v = (F.linear(part, _weight_of(self, which), _bias_of(self, which)) for which, part in inputs)
        return q, k, v

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """``(samples, heads, positions, size of a head)``."""
        if not batched:
            x = x.unsqueeze(0)
        x = x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim)
        return x.transpose(1, 2) if self.batch_first or not batched else x.permute(1, 2, 0, 3)

    def _joined(self, x: Tensor, batched: bool) -> Tensor:
        """Concatenate the heads, in the input's order of dimensions."""
        x = (x.transpose(1, 2) if self.batch_first or not batched else x.permute(2, 0, 1, 3)).flatten(2)
        return x if batched else x.squeeze(0)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, batched: bool) -> Tensor | None:
        """Merge both masks into one, as `attend` takes it: in a boolean mask, True takes part."""
        parts = []
        if mask is not None:
            parts.append(mask.reshape(-1, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask)
        if padding is not None:
            parts.append(padding[:, None, None] if batched else padding[None, None, None])
        if not parts:
            return None
        if all(part.dtype == torch.bool for part in parts):
            return (parts[0] if len(parts) == 1 else parts[0].logical_or(parts[1])).logical_not()
        added = [part if part.is_floating_point() else _additive(part, self.out_proj.weight) for part in parts]
        return added[0] if len(added) == 1 else added[0] + added[1]

    def _with_positions(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the positions of ``add_bias_kv`` and ``add_zero_attn`` to keys and values; they are never masked."""
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            shape = 1, 1, self.num_heads, self.head_dim
            more = (
                bias.reshape(shape).transpose(1, 2).expand(k.shape[0], -1, -1, -1)
                for bias in (self.bias_k, self.bias_v)
            )
            k, v = (torch.cat([part, one], 2) for part, one in zip((k, v), more, strict=True))
            added += 1
        if self.add_zero_attn:
            k, v = (torch.cat([part, torch.zeros_like(part[:, :, :1])], 2) for part in (k, v))
            added += 1
        if mask is not None and added:
            mask = F.pad(mask, (0, added), value=True) if mask.dtype == torch.bool else F.pad(mask, (0, added))
        return k, v, mask


def _weight_of(attention: nn.MultiheadAttention, which: int) -> Tensor:
    """Weight of one of the linear maps: rows of the packed parameter, or a parameter of its own."""
    if attention.in_proj_weight is None:
        return (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)[which]
    return attention.in_proj_weight[_rows_of(attention, which)]


def _bias_of(attention: nn.MultiheadAttention, which: int) -> Tensor | None:
    """Bias of one of the linear maps."""
    return None if attention.in_proj_bias is None else attention.in_proj_bias[_rows_of(attention, which)]


def _rows_of(attention: nn.MultiheadAttention, which: int) -> slice:
    return slice(which * attention.embed_dim, (which + 1) * attention.embed_dim)


class RowsOfAttention:
    """Weight and bias of one of the linear maps of queries, keys and values, read from the attention's parameters.

    Attributes:
        attention: The module that holds the parameters.
        which: Index of query, key or value.
    """

    attention: tuple[nn.MultiheadAttention]
    which: int

    @property
    def weight(self) -> Tensor:
        """Rows of the packed parameter, or a parameter of its own."""
        return _weight_of(self.attention[0], self.which)

    @property
    def bias(self) -> Tensor | None:
        """Rows of the packed parameter."""
        return _bias_of(self.attention[0], self.which)


class Projection(RowsOfAttention, nn.Linear):  # type: ignore[misc, override]
    """A linear map of attention as a layer without parameters of its own.

    Args:
        attention: The module that holds the parameters.
        which: Index of query, key or value.
    """

    def __init__(self, attention: nn.MultiheadAttention, which: int) -> None:
        nn.Module.__init__(self)
        self.in_features = (attention.embed_dim, attention.kdim, attention.vdim)[which]
        self.out_features, self.which = attention.embed_dim, which
        self.__dict__["attention"] = (attention,)  # not a child: it is the parent


class LayeredAttention(WrittenAttention):
    """Attention that calls a separate layer for each of its linear maps."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Same as ``nn.MultiheadAttention``, also in the layout of its output."""
        output, weights = super().forward(*args, **kwargs)
        return (PositionsFirst().train(self.training)(output) if self.batch_first else output), weights

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value after their linear maps."""
        children: dict[str, Any] = dict(self.named_children())
        return children["query"](query), children["key"](key), children["value"](value)

    def drop_parameters(self) -> None:
        """Drop the parameters that `Projection` reads, once no child uses them."""
        if not any(isinstance(child, Projection) for child in self.children()):
            for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self._parameters[name] = None


def attentions(network: nn.Module, chosen: Callable[[str], bool]) -> list[Any]:
    """The attention modules of a network that are chosen by name and can be written out."""
    found = []
    for name, module in network.named_modules():
        if type(module) is nn.MultiheadAttention and chosen(name):
            found.append(module)
    return found


def give_layers(attention: nn.MultiheadAttention) -> None:
    """Turn an attention into a `LayeredAttention`, keeping the object; `take_layers` undoes it."""
    attention.__class__ = LayeredAttention
    attention.out_proj.__class__ = nn.Linear  # type: ignore[assignment]
    for number, name in enumerate(MAPS):
        attention.add_module(name, Projection(attention, number).train(attention.training))


def take_layers(attention: nn.MultiheadAttention) -> None:
    """Undo `give_layers`."""
    attention.__class__ = nn.MultiheadAttention
    attention.out_proj.__class__ = nn.modules.linear.NonDynamicallyQuantizableLinear
    for name in MAPS:
        del attention._modules[name]


MAPS = ("query", "key", "value")
"""The names of the layers that `give_layers` creates."""


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


class WrittenEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` without its fast path."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Same as ``nn.TransformerEncoderLayer`` in training."""
        masks = (src_mask, src_key_padding_mask)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
        normalized: Tensor = self.norm2(src + self._ff_block(src))
        return normalized


class WrittenDecoderLayer(nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer``, traced through rather than called as a whole."""


class WrittenEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` without nested tensors, and without reading the values of a mask."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Same as ``nn.TransformerEncoder``, where ``is_causal`` only selects a kernel."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal is True)
        return src if self.norm is None else self.norm(src)


class WrittenDecoder(nn.TransformerDecoder):
    """``nn.TransformerDecoder`` without reading the values of a mask."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Same as ``nn.TransformerDecoder``, where ``is_causal`` only selects a kernel."""
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal is True,
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)


class WrittenTransformer(nn.Transformer):
    """``nn.Transformer``, traced through rather than called as a whole."""


CONTAINERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: WrittenEncoderLayer,
    nn.TransformerDecoderLayer: WrittenDecoderLayer,
    nn.TransformerEncoder: WrittenEncoder,
    nn.TransformerDecoder: WrittenDecoder,
    nn.Transformer: WrittenTransformer,
}
"""The class in plain ops for each of torch's modules around attention."""


def _written(module: nn.Module) -> type[nn.Module] | None:
    """The class in plain ops for a module; also for a user's subclass that does not override ``forward``."""
    own: Any = type(module)
    known: dict[Any, type[nn.Module]] = {**CONTAINERS, nn.MultiheadAttention: WrittenAttention}
    for plain, written in known.items():
        if own is plain:
            return written
        if isinstance(module, plain) and own.forward is plain.forward and not is_parametrized(module):
            return type(own.__name__, (written, own), {"__module__": __name__})
    return None


@contextmanager
def written_out(network: nn.Module, attention: Callable[[str], bool], when: bool = True) -> Iterator[None]:
    """Within the block the network's transformer layers, and the chosen attention modules, are replaced by plain ops.

    Args:
        network: Its modules get their own classes back after the block.
        attention: Whether to replace an attention module as well, by its name.
        when: With False, nothing is replaced.
    """
    before: list[tuple[Any, type[nn.Module]]] = []
    for name, module in network.named_modules() if when else ():
        kind = _written(module)
        if isinstance(module, nn.MultiheadAttention) and kind is not None:
            kind = kind if attention(name) else None
            before += [(module.out_proj, type(module.out_proj))] if kind else []
        if kind is not None:
            before.append((module, type(module)))
            module.__class__ = kind
    for module, _ in before:
        if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind
