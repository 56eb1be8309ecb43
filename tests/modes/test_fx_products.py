"""Products of two tensors in mode fx: attention as one function, the operator ``@``, ``bmm``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.fx import plan as fx_plan
from qat_lightning.modes.prepared import cpu_copy, fake_quantizers
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe

RECIPE = Recipe("fx", "x86")


class Attention(nn.Module):
    """Self-attention with four heads, written in a given way."""

    def __init__(self, way: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(4)
        self.bias = nn.Parameter(torch.randn(1, 4, 8, 8))
        self.register_buffer("mask", (torch.rand(8, 8) > 0.3).logical_or(torch.eye(8, dtype=torch.bool)))
        self.way, self.dropout = way, dropout

    def forward(self, x: Tensor) -> Any:
        """Attend."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.dropout if self.training else 0.0
        if self.way == "operator":
            mixed = (q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.way == "bmm":
            weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1)
            mixed = weights.bmm(v.flatten(0, 1)).reshape(batch, 4, length, 4)
        elif self.way == "normed":
            mixed = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v, dropout_p=p)
        elif self.way == "causal":
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        elif self.way == "bias":
            mixed = F.scaled_dot_product_attention(q, k, v, self.bias, p)
        elif self.way == "mask":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=p, scale=0.3)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


def made(way: str, dropout: float = 0.0) -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    return Attention(way, dropout), Example((torch.randn(4, 8, 16),))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("way", ["plain", "normed", "causal", "bias", "mask"])
def test_attention_is_int8(way: str, dropout: float) -> None:
    found = rehearse(*made(way, dropout), RECIPE)
    assert (found.left_float, found.int8_macs, found.unsaved) == ({}, 1.0, "")


@pytest.mark.parametrize("way", ["operator", "bmm"])
def test_products_are_int8_however_they_are_written(way: str) -> None:
    found = rehearse(*made(way), RECIPE)
    assert (found.left_float, found.int8_macs, found.unsaved) == ({}, 1.0, "")


class ReadsTheShape(nn.Module):
    """Attention as in transformers: heads are merged with the product's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        samples, heads, length, width = mixed.shape
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(samples, length, heads * width))
        return y


def test_a_product_whose_shape_is_read_is_int8() -> None:
    found = rehearse(ReadsTheShape(), Example((torch.randn(2, 6, 8),)), Recipe("fx", "x86"))
    assert found.int8_macs == 1
    assert not found.left_float


class LinearInAllButName(nn.Module):
    """Linear layers as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 16) / 3), nn.Parameter(torch.randn(16))
        self.second, self.head = nn.Parameter(torch.randn(16, 16) / 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.mm(torch.addmm(self.bias, x, self.weight).relu(), self.second).relu())
        return y


class Transposed(nn.Module):
    """Linear layers as in Falcon, which derive from ``nn.Linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 8) / 3), nn.Parameter(torch.randn(16))
        self.other, self.head = nn.Parameter(torch.randn(16, 16) / 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.weight.T + self.bias).relu()
        y: Tensor = self.head((self.bias + x.matmul(self.other)).relu())
        return y


def test_products_with_a_weight_are_linear_layers_with_their_bias() -> None:
    network, example = Transposed(), Example((torch.randn(4, 3, 8),))
    found = rehearse(network, example, RECIPE)
    assert found.int8_macs == 1
    assert [row.kind for row in found.coverage if row.macs] == ["Linear", "linear", "linear"]
    assert not [row for row in found.coverage if row.kind == "add"]
    prepared = get_mode("fx").prepare(copy.deepcopy(network), example, RECIPE)
    for _, fq in fake_quantizers(prepared):
        fq.enable_fake_quant(False)
    torch.testing.assert_close(prepared.eval()(*example.args), network(*example.args))


def test_addmm_and_mm_with_a_weight_are_linear_layers() -> None:
    network, example = LinearInAllButName(), Example((torch.randn(4, 8),))
    found = rehearse(network, example, Recipe("fx", "x86"))
    assert found.int8_macs == 1
    assert {row.kind for row in found.coverage if row.macs} == {"linear", "Linear"}
    prepared = get_mode("fx").prepare(copy.deepcopy(network), example, Recipe("fx", "x86"))
    assert set(network.state_dict()) <= set(prepared.state_dict())


def test_a_checkpoint_from_before_they_were_linear_layers_loads() -> None:
    """It has no ranges for them; its message says how to prepare for them."""
    example = Example((torch.randn(4, 8),))
    earlier = replace(RECIPE, families=tuple(set(RECIPE.families) - {"linear", "products"}))
    before = get_mode("fx").prepare(LinearInAllButName(), example, earlier)
    again = get_mode("fx").prepare(LinearInAllButName(), example, Recipe.from_dict(earlier.to_dict()))
    again.load_state_dict(before.state_dict())
    rows = {row.kind: row.quantized for row in get_mode("fx").coverage(again, example) if row.macs}
    assert rows == {"Linear": True, "addmm": False, "mm": False}


def test_attention_drops_out_in_training_and_not_in_evaluation() -> None:
    network, example = made("plain", 0.5)
    prepared = get_mode("fx").prepare(network, example, RECIPE)
    one, other = prepared(*example.args), prepared(*example.args)
    assert not torch.equal(one, other)
    prepared.eval()
    assert torch.equal(prepared(*example.args), prepared(*example.args))


def test_what_is_excluded_stays_one_function() -> None:
    network, example = made("plain")
    prepared = get_mode("fx").prepare(nn.Sequential(network), example, Recipe("fx", "x86", include=("0.proj",)))
    assert any(node.target is F.scaled_dot_product_attention for node in prepared.graph.nodes)  # type: ignore[union-attr]


def test_a_checkpoint_from_before_loads_and_leaves_products_float(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fx_plan, "quantize_products", lambda *args, **kwargs: [])
        network, example = made("plain")
        earlier = get_mode("fx").prepare(network, example, RECIPE)
    earlier(*example.args)
    later = [get_mode("fx").prepare(*made("plain"), RECIPE) for _ in range(2)]
    later[0].load_state_dict(earlier.state_dict())
    later[1].load_state_dict(later[0].state_dict())
    for prepared in later:
        assert torch.allclose(prepared.eval()(*example.args), earlier.eval()(*example.args), atol=1e-6)
        converted = get_mode("fx").convert(cpu_copy(prepared), example)
        assert not any(row.quantized for row in converted.operations if row.kind == "matmul")
        assert all(row.quantized for row in converted.coverage if row.kind == "Linear")
