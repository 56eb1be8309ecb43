"""Mode fx quantizes a product however it is written, and heads that share keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import fake_quantizers
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.rehearse import Rehearsal, rehearse
from qat_lightning.settings.recipe import Recipe

RECIPE = Recipe("fx", "x86")


class Heads(nn.Module):
    """Four queries per position, and a given number of keys and values."""

    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor], shared: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 4 * shared), nn.Linear(8, 4 * shared)
        self.out, self.mix, self.shared = nn.Linear(16, 8), mix, shared

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = (layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y: Tensor = self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))
        return y


def repeated(x: Tensor, times: int) -> Tensor:
    """Repeats keys like transformers."""
    samples, heads, length, width = x.shape
    return x[:, :, None].expand(samples, heads, times, length, width).reshape(samples, heads * times, length, width)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (2, 2))
    weights = torch.einsum("b g n l d, b g s d -> b g n l s", q, k).softmax(-1)
    return torch.einsum("bgnls,bgsd->bgnld", weights, v).flatten(1, 2)


def with_sizes_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
    return torch.einsum("...hqk,...khd->...qhd", weights, v).transpose(1, 2)


def one_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v[:, 0])


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as in BLOOM."""
    bias = torch.linspace(-1, 0, 6).reshape(1, 1, 6).expand(12, 1, 6)
    weights = bias.baddbmm(batch1=q.flatten(0, 1), batch2=k.flatten(0, 1).mT, beta=0.5, alpha=0.3).softmax(-1)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (3, 4))


SHARING: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "enable_gqa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 2),
    "expand": (lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k, 2), repeated(v, 2)), 2),
    "repeat_interleave": (
        lambda q, k, v: q @ k.repeat_interleave(2, 1).mT @ torch.repeat_interleave(v, 2, dim=1),
        2,
    ),
    "broadcast": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 1),
    "broadcast by @": (lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v, 1),
    "broadcast by matmul": (lambda q, k, v: torch.matmul(torch.matmul(q, k.mT).softmax(-1), v), 1),
    "einsum in groups": (grouped, 2),
    "einsum with dots": (with_sizes_last, 4),
    "einsum of one key": (one_key, 1),
    "baddbmm": (biased, 4),
}


def checked(network: nn.Module, example: Example) -> Rehearsal:
    """Rehearse, and compare the graph without fake-quantization with the network."""
    prepared = get_mode("fx").prepare(copy.deepcopy(network), example, RECIPE)
    for _, fq in fake_quantizers(prepared):
        fq.enable_fake_quant(False)
    torch.testing.assert_close(prepared.eval()(*example.args), network.eval()(*example.args), rtol=1e-4, atol=1e-5)
    return rehearse(network, example, RECIPE)


@pytest.mark.parametrize("way", SHARING)
def test_heads_that_share_keys_are_int8(way: str) -> None:
    torch.manual_seed(0)
    found = checked(Heads(*SHARING[way]), Example((torch.randn(3, 6, 8),)))
    assert (found.left_float, found.int8_macs, found.unsaved) == ({}, 1.0, "")


class Between(nn.Module):
    """A layer, a given product, and a layer."""

    def __init__(self, product: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.product = nn.Linear(8, 8), product
        self.w, self.cube, self.b = (nn.Parameter(torch.randn(*size) / 3) for size in ((8, 8), (8, 2, 4), (8,)))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return self.product(self, self.first(x).relu())


WEIGHTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "einsum": lambda m, x: torch.einsum("bld,od->blo", x, m.w) + m.b,
    "einsum, weight first": lambda m, x: torch.einsum("do,bld->blo", m.w, x),
    "einsum into heads": lambda m, x: torch.einsum("bld,dhk->bhlk", x, m.cube),
    "einsum of heads": lambda m, x: torch.einsum("blhk,ohk->blo", x.unflatten(2, (2, 4)), m.cube),
    "tensordot": lambda m, x: torch.tensordot(x, m.w, dims=1),
    "inner": lambda m, x: torch.inner(x, m.w),
    "addmm": lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w, beta=0.5, alpha=2.0),
    "addmm of a tensor": lambda m, x: m.b.addmm(x.flatten(0, 1), m.w.t()),
}


@pytest.mark.parametrize("way", WEIGHTS)
def test_products_with_a_parameter_are_linear_layers(way: str) -> None:
    torch.manual_seed(0)
    found = checked(Between(WEIGHTS[way]), Example((torch.randn(3, 6, 8),)))
    assert (found.left_float, found.int8_macs, found.unsaved) == ({}, 1.0, "")
    assert [row.kind for row in found.coverage if row.macs] == ["Linear", "linear"]


PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mm": lambda m, x: torch.mm(x[0], x[1].t()).mm(x[1]),
    "mv": lambda m, x: torch.mv(x[0], x[0, 0]),
    "dot": lambda m, x: torch.dot(x[0, 0], x[0, 1]),
    "by name": lambda m, x: torch.bmm(input=x, mat2=x.mT).matmul(other=x),
    "addmm": lambda m, x: torch.addmm(x[0], x[1], x[2].t() @ x[0]),
    "addbmm": lambda m, x: torch.addbmm(m.b, x, x.mT @ x),
    "addmv": lambda m, x: torch.addmv(x[0, :, 0], x[1], x[2, 0], alpha=2),
    "tensordot": lambda m, x: torch.tensordot(x, x, dims=([1, 2], [1, 2])),
    "inner": lambda m, x: torch.inner(x, x[0]),
    "einsum of three": lambda m, x: torch.einsum("bld,de,bme->blm", x, m.w, x),
    "einsum without arrow": lambda m, x: torch.einsum("bij,bkj", x, x),
}  # fmt: skip


@pytest.mark.parametrize("way", PRODUCTS)
def test_products_of_activations_are_int8(way: str) -> None:
    torch.manual_seed(0)
    found = checked(Between(PRODUCTS[way]), Example((torch.randn(3, 6, 8),)))
    assert (found.left_float, found.int8_macs, found.unsaved) == ({}, 1.0, "")


FLOAT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "outer product": lambda m, x: x.sum(1)[:, :, None] @ x.sum(1)[:, None],
    "multi_dot": lambda m, x: torch.linalg.multi_dot([x[0], m.w, x[1].t()]),
    "float64": lambda m, x: x.double() @ x.mT.double(),
}


@pytest.mark.parametrize("way", FLOAT)
def test_other_products_stay_float_and_say_why(way: str) -> None:
    found = checked(Between(FLOAT[way]), Example((torch.randn(3, 6, 8),)))
    rows = [row for row in found.coverage if row.macs and not row.quantized]
    assert rows
    assert all("no int8 kernel" not in row.reason and row.reason for row in rows)
    assert not found.left_float


def test_a_checkpoint_from_before_leaves_what_was_float() -> None:
    example = Example((torch.randn(3, 6, 8),))
    earlier = replace(RECIPE, families=tuple(name for name in RECIPE.families if name != "products"))
    for way in ("broadcast", "enable_gqa", "baddbmm", "einsum of one key"):
        before = get_mode("fx").prepare(Heads(*SHARING[way]), example, earlier)
        rows = [row for row in get_mode("fx").coverage(before, example) if row.macs and row.what == "op"]
        assert not all(row.quantized for row in rows)
