"""Embeddings in training: the table is fake-quantized row by row, as the integer embedding will store it.

Lookup results are float, in training and in the int8 network. Each row is rounded on the grid of its own largest value,
so a row of zeros, as at ``padding_idx``, stays zero. Every parameter keeps its float name, and the layer stays the same
object.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.layers.integer import why_not
from qat_lightning.layers.integer.integer_layer import take_over_hooks
from qat_lightning.layers.integer.weight_only import WeightOnlyEmbedding
from qat_lightning.layers.integer.weights import WeightGrid, store
from qat_lightning.layers.operators import module_types
from qat_lightning.layers.qat_modules import round_for_good
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe

TABLES: Any = module_types("table")

_TRAINED = Recipe("eager", "x86", kind="weight_only", trained=True)


class RoundedEmbedding(nn.Embedding):
    """`nn.Embedding` whose table is fake-quantized."""

    weight_fake_quant: FakeQuantize

    def forward(self, input: Tensor) -> Tensor:
        """Look up rounded rows."""
        table = self.weight_fake_quant(self.weight)
        return F.embedding(input, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class RoundedEmbeddingBag(nn.EmbeddingBag):
    """`nn.EmbeddingBag` whose table is fake-quantized."""

    weight_fake_quant: FakeQuantize

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Reduce bags of rounded rows."""
        return F.embedding_bag(
            input,
            self.weight_fake_quant(self.weight),
            offsets,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )


_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Embedding: RoundedEmbedding,
    nn.EmbeddingBag: RoundedEmbeddingBag,
}
_PLAIN = {rounded: plain for plain, rounded in _ROUNDED.items()}


def is_rounded_table(module: nn.Module) -> bool:
    """Whether a module is an embedding whose table is fake-quantized."""
    return type(module) in _PLAIN


def why_float(module: nn.Module) -> str:
    """Why the table of an embedding stays float; empty if it can be quantized.

    Example:
        >>> why_float(nn.Embedding(4, 2)), why_float(nn.Embedding(4, 2, max_norm=1.0))
        ('', 'Embedding with max_norm rescales its rows in every call')
    """
    return why_not(module, _TRAINED)


def round_table(module: nn.Module, fake_quantize: FakeQuantize) -> None:
    """Let an embedding fake-quantize its table from now on; it stays the same object."""
    weight: Any = module.weight
    module.__dict__["_modules"] = dict(module._modules)  # an alias of the module may share the dictionary
    module.__class__ = _ROUNDED[type(module)]
    fake_quantize.materialize(weight)
    module.add_module("weight_fake_quant", fake_quantize.to(weight.device).train(module.training))


def make_tables_plain(network: nn.Module) -> None:
    """Undo `round_table` for all embeddings of a network."""
    for module in network.modules():
        if is_rounded_table(module):
            module._modules.pop("weight_fake_quant")
            module.__class__ = _PLAIN[type(module)]


@torch.no_grad()
def integer_table(module: Any) -> WeightOnlyEmbedding:
    """The integer embedding of a fake-quantized one; its values are exactly those of training.

    Args:
        module: A `RoundedEmbedding` or `RoundedEmbeddingBag`, on the CPU, in float32; its range is held from now on.
    """
    fq: FakeQuantize = module.weight_fake_quant
    rounded = round_for_good(module.weight, fq)
    scales = fq.calculate_qparams()[0].float().expand(rounded.shape[0])[:, None]
    grid = table_grid(fq)
    made = WeightOnlyEmbedding.empty(module, grid)
    made.scales = scales.clone()
    made.integers = store(torch.round(rounded / scales).to(torch.int8), grid)
    take_over_hooks(made, module)
    return made


def table_grid(fq: FakeQuantize) -> WeightGrid:
    """The grid of the integers of a table's FakeQuantize."""
    return WeightGrid(fq.quant_min, fq.quant_max, group=0 if fq.per_channel else -1)
