"""Modules that get their parameters in their first call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Example, Recipe, load_quantized, prepare, quantize, rehearse
from qat_lightning.errors import NetworkError
from qat_lightning.graph.lazy import is_lazy, materialize, refuse_lazy

X = torch.randn(4, 3, 6, 6)


def lazy() -> nn.Sequential:
    return nn.Sequential(
        nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4)
    )


class Heads(nn.Module):
    """One head is called in training only, another one in evaluation only."""

    def __init__(self, *, unused: bool = False) -> None:
        super().__init__()
        self.training_head, self.evaluation_head = nn.LazyLinear(2), nn.LazyLinear(3)
        if unused:
            self.unused = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        head = self.training_head if self.training else self.evaluation_head
        result: Tensor = head(x.flatten(1))
        return result


def test_parameters_are_those_of_a_first_call() -> None:
    called, made = lazy(), lazy()
    torch.manual_seed(0)
    called(X)
    torch.manual_seed(0)
    materialize(made, Example((X,)))
    assert list(map(type, made)) == list(map(type, called))
    assert all(torch.equal(one, other) for one, other in zip(made.parameters(), called.parameters(), strict=True))
    assert all(p.requires_grad and p.grad_fn is None for p in made.parameters())
    assert made.training


def test_modules_of_training_and_of_evaluation_get_parameters() -> None:
    network = Heads()
    materialize(network, Example((X,)))
    assert not any(map(is_lazy, network.modules()))
    assert network.training


def test_a_module_that_is_not_called_is_named() -> None:
    with pytest.raises(NetworkError, match=r"does not call 'unused'.*nn\.Linear instead"):
        materialize(Heads(unused=True), Example((X,)))


def test_a_call_that_fails_is_an_error_of_the_example() -> None:
    with pytest.raises(NetworkError, match="example_inputs"):
        materialize(lazy(), Example((torch.zeros(()),)))


@pytest.mark.parametrize(
    "use",
    [
        lambda network: prepare(network, Example((X,)), Recipe("fx", "x86")),
        lambda network: quantize(network, Example((X,)), Recipe("fx", "x86", kind="dynamic")),
        lambda network: rehearse(network, Example((X,)), Recipe("fx", "x86")),
        lambda network: load_quantized("model.int8", network=network),
    ],
    ids=["prepare", "quantize", "rehearse", "load"],
)
def test_functions_for_plain_modules_ask_for_a_first_call(use: Any) -> None:
    with pytest.raises(NetworkError, match=r"'0', '1', '5'\): call it once"):
        use(lazy())


def test_after_a_call_nothing_is_refused() -> None:
    network = lazy()
    network(X)
    refuse_lazy(network)
    prepare(network, Example((X,)), Recipe("fx", "x86"))
