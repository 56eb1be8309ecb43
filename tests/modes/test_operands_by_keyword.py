"""Tensors that a forward gives by keyword are quantized like those in their places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import Example, Recipe, calibrate, convert, prepare

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class InTheirPlaces(nn.Module):
    """Layers, functions and methods whose inputs are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.second, self.pool = nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)
        self.linear, self.head = nn.Linear(128, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        y = F.relu(self.second(x), inplace=True)
        y = torch.add(x, y).mul(y)
        y = self.pool(F.max_pool2d(torch.cat([x, y], 1)[:, :8], 1))
        y = self.linear(torch.flatten(y, 1))
        product = torch.matmul(y.unsqueeze(2), y.unsqueeze(1))
        return self.head(y) + product.mean(2)


class ByKeyword(InTheirPlaces):
    """The same with names."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(input=self.norm(input=self.first(input=x)))
        y = F.relu(inplace=True, input=self.second(input=x))
        y = torch.add(input=x, other=y).mul(other=y)
        y = self.pool(input=F.max_pool2d(input=torch.cat(dim=1, tensors=[x, y])[:, :8], kernel_size=1))
        y = self.linear(input=torch.flatten(input=y, start_dim=1))
        product = torch.matmul(input=y.unsqueeze(2), other=y.unsqueeze(1))
        return self.head(input=y) + product.mean(2)


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
@pytest.mark.parametrize("kind", ["static", "qat"])
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_they_give_the_same_int8_network(mode: str, kind: Any, backend: str) -> None:
    if mode == "pt2e" and backend == "qnnpack":
        pytest.skip("mode pt2e has no such backend")
    networks = []
    for make in (InTheirPlaces, ByKeyword):
        torch.manual_seed(0)
        network = make()
        for _ in range(5):
            network(IMAGES)
        prepared = prepare(network.eval(), Example((IMAGES,)), Recipe(mode, backend, kind=kind))
        calibrate(prepared, [IMAGES])
        networks.append(convert(prepared, Example((IMAGES,))))
    one, other = networks
    assert all(row.quantized for row in other.coverage)
    assert [row.quantized for row in one.operations] == [row.quantized for row in other.operations]
    assert torch.equal(one(IMAGES), other(IMAGES))
