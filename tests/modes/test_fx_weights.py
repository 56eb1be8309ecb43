"""Parameters and buffers that a network reads directly, in mode fx: also of layers that it calls, under any name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe
from tests.modes.carried import carried_through


class Twice(nn.Module):
    """A linear layer, and ``read``, which gets its output, its input and the layer."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.a, self.c, self.read = nn.Linear(16, 12), nn.Linear(12, 8), read

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.read(F.relu(self.c(x)), x, self.c)


READS = {
    "transposed": lambda y, x, c: F.linear(y, c.weight.t()),
    "again": lambda y, x, c: y + F.linear(x, c.weight, c.bias),
    "product": lambda y, x, c: y @ c.weight,
    "penalty": lambda y, x, c: y * c.weight.abs().mean() + c.bias,
    "device, type and shape": lambda y, x, c: (
        y.to(c.weight.device).to(c.weight.dtype) + len(c.weight) + c.bias.shape[0]
    ),
    "standardized": lambda y, x, c: y + F.linear(x, c.weight - c.weight.mean(1, keepdim=True)),
    "of the input": lambda y, x, c: y + F.linear(x, c.weight * x.mean()),
}


@pytest.mark.parametrize("exclude", [(), ("c",)], ids=["int8", "excluded"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_weight_of_a_layer_is_read_as_well(read: Any, exclude: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    rows = carried_through(Twice(read), torch.randn(8, 16), exclude=exclude).coverage
    assert [row.quantized for row in rows] == [True, not exclude]


class Tied(nn.Module):
    """An embedding tied to the classifier."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False) if shared else None
        if self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(self.embedding(x)))
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("exclude", [(), ("embedding",)])
def test_tied_embeddings(shared: bool, exclude: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    carried_through(Tied(shared), torch.randint(0, 10, (4, 5)), exclude=exclude)


class Named(nn.Module):
    """A buffer, a parameter or a layer named like a method or function."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__()
        self.kind, self.name = kind, name
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        value = torch.rand(1, 3, 1, 1)
        if kind == "buffer":
            self.register_buffer(name, value)
        elif kind == "parameter":
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.add_module(name, nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        named = getattr(self, self.name)
        if self.kind == "module":
            return self.b(torch.relu(self.a(named(x)))) + x
        return self.b(torch.relu(self.a(x - named))) + named


@pytest.mark.parametrize("kind", ["buffer", "parameter", "module"])
@pytest.mark.parametrize("name", ["mean", "relu", "view", "add", "sigmoid", "flatten", "shape_of"])
@pytest.mark.slow
def test_names_that_methods_and_functions_have(kind: str, name: str) -> None:
    torch.manual_seed(0)
    carried_through(Named(kind, name), torch.randn(4, 3, 8, 8))


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, mean: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(mean)).mean((2, 3), keepdim=True)) + mean


def test_an_argument_called_like_a_method() -> None:
    carried_through(Mean(), torch.randn(4, 3, 8, 8))


class Shifted(nn.Module):
    """A buffer that is used in a computation before the graph begins."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shift * 2


def test_a_buffer_that_is_loaded_later_counts() -> None:
    """It is not a constant of the trace."""
    x = torch.zeros(2, 3, 4, 4)
    prepared = get_mode("fx").prepare(Shifted(), Example((x,)), Recipe("fx", "x86"))
    for module in prepared.modules():
        if hasattr(module, "enable_fake_quant"):
            module.enable_fake_quant(False)
    before = prepared(x)
    prepared.load_state_dict(prepared.state_dict() | {"shift": torch.full((1,), 3.0)})
    torch.testing.assert_close(prepared(x), before + 4)
