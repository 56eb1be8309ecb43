"""Divisors are not quantized in mode fx."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe

RECIPE = Recipe("fx", "x86")


def linear_attention(q: Tensor, k: Tensor) -> Tensor:
    """Divides by its last column, which is much smaller than the others."""
    mixed = q.relu() @ (k.relu().transpose(-2, -1) @ nn.functional.pad(k, (0, 1), value=1e-3))
    return mixed[..., :-1] / (mixed[..., -1:] + 1e-15)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "truediv": lambda q, k: q / (k.abs() + 1e-6),
    "method": lambda q, k: q.div(k.abs().add(1e-6)),
    "reciprocal": lambda q, k: q * torch.reciprocal(k * k + 1e-6),
    "rsqrt": lambda q, k: q * (k * k + 1e-6).rsqrt(),
    "power": lambda q, k: q * (k * k + 1e-6) ** -0.5,
    "log": lambda q, k: q + torch.log(k * k + 1e-6),
    "product": linear_attention,
}


class Divides(nn.Module):
    """Divides the output of one layer by another's, with a layer after it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.way = WAYS[way]

    def forward(self, x: Tensor) -> Tensor:
        """Divide."""
        return self.last(self.way(self.one(x), self.other(x)))


@pytest.mark.parametrize("way", WAYS)
def test_training_stays_finite_and_all_layers_are_int8(way: str) -> None:
    torch.manual_seed(0)
    network, example = Divides(way), Example((torch.randn(4, 16, 8),))
    prepared = get_mode("fx").prepare(network, example, RECIPE)
    output = prepared(*example.args)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in prepared.parameters())
    found = rehearse(Divides(way), example, RECIPE)
    assert not found.unsaved
    assert all(row.quantized for row in found.coverage if row.kind == "Linear")


def test_a_product_that_is_divided_by_is_named_with_the_reason() -> None:
    torch.manual_seed(0)
    found = rehearse(Divides("product"), Example((torch.randn(4, 16, 8),)), RECIPE)
    reasons = {row.reason for row in found.coverage if row.kind == "matmul" and not row.quantized}
    assert reasons == {"divisors are not rounded"}
