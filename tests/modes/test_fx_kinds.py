"""Decisions by the type of a value in a trace of mode fx, such as ``isinstance(x, Tensor)`` between two layers."""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import prepare
from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import fake_quantizers
from qat_lightning.modes.tracing import trace
from qat_lightning.settings.recipe import Recipe

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

TENSOR: dict[str, Callable[[Any], bool]] = {
    "isinstance": lambda x: isinstance(x, Tensor),
    "isinstance of several": lambda x: isinstance(x, (list, tuple, Tensor)),
    "not a container": lambda x: not isinstance(x, (list, tuple, dict)),
    "is_tensor": lambda x: torch.is_tensor(x),
    "jit.isinstance": lambda x: torch.jit.isinstance(x, Tensor),
    "jit.isinstance of a list": lambda x: torch.jit.isinstance([x, x], typing.List[Tensor]),  # noqa: UP006
    "type is": lambda x: type(x) is Tensor,
    "type in": lambda x: type(x) in (Tensor, nn.Parameter),
    "issubclass": lambda x: issubclass(type(x), Tensor),
    "name of the type": lambda x: type(x).__name__ == "Tensor",
    "type of a class": lambda x: isinstance(type(x), type) and type(Tensor) is type(nn.Parameter).__mro__[1],
}


class Asks(nn.Module):
    """Adds a skip connection where the question about it is answered with yes."""

    def __init__(self, asks: Callable[[Any], bool]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        y = self.second(F.relu(skip))
        if self.asks(skip):
            y = y + 3 * skip
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


def unrounded(network: nn.Module) -> nn.Module:
    prepared = prepare(network, Example((IMAGES,)), Recipe("fx", "x86"))
    for _, fq in fake_quantizers(prepared):
        fq.enable_fake_quant(False)
    return prepared


@pytest.mark.parametrize("asks", TENSOR.values(), ids=list(TENSOR))
def test_an_intermediate_value_is_a_tensor(asks: Callable[[Any], bool]) -> None:
    network = Asks(asks)
    assert asks(IMAGES)
    prepared = unrounded(copy.deepcopy(network))
    for x in (IMAGES, torch.randn(7, 3, 6, 10)):
        torch.testing.assert_close(prepared(x), network(x), rtol=1e-4, atol=1e-4)
    assert not {"isinstance", "type"} & set(globals())


class InTraining(Asks):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        if self.training and isinstance(y, Tensor):
            y = F.dropout(y, 0.5)
        logits: Tensor = self.head(self.second(y).mean((2, 3)))
        return logits


def test_a_decision_in_training_only_is_not_missed() -> None:
    """Evaluation, in which the results are compared, does not show it."""
    with pytest.raises(TraceError, match=r"depends on self\.training"):
        unrounded(InTraining(TENSOR["isinstance"]))


class TuplesOfLayers(Asks):
    """A layer that returns a tuple, and its parameter."""

    def __init__(self) -> None:
        super().__init__(lambda x: isinstance(x, tuple))
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(self.first(x))
        if isinstance(pooled, tuple) and not isinstance(self.head.weight, tuple):
            pooled, _ = pooled
        y: Tensor = self.head(self.second(pooled).mean((2, 3)))
        return y * 2 if isinstance(self.head.weight, nn.Parameter) else y


def test_the_result_of_a_layer_may_be_a_tuple_and_a_parameter_is_one() -> None:
    network = TuplesOfLayers()
    prepared = unrounded(copy.deepcopy(network))
    torch.testing.assert_close(prepared(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_parameter_is_known_without_sizes() -> None:
    """Its type does not make the graph one for the sizes of the example."""
    network = Asks(lambda x: isinstance(network.head.weight, nn.Parameter))
    _, _, sizes = trace(network, Example((IMAGES,)), [])
    assert sizes is None
