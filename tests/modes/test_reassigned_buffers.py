"""Buffers that a forward assigns a new value to: a graph mode raises an error if the next call depends on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.recipe import Recipe

GRAPHS = ("fx", "pt2e")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("without_compiler")


class Network(nn.Module):
    """Two layers, and what happens to buffers between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", None)
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.norm(self.first(x))))


def _average(network: Any, y: Tensor) -> Tensor:
    network.mean = 0.9 * network.mean + 0.1 * y.detach().mean(0)
    return y - network.mean


def _average_in_training(network: Any, y: Tensor) -> Tensor:
    z = y - network.mean
    if network.training:
        network.mean = 0.9 * network.mean + 0.1 * y.detach().mean(0)
    return z


def _average_written(network: Any, y: Tensor) -> Tensor:
    network.mean.copy_(0.9 * network.mean + 0.1 * y.detach().mean(0))
    return y - network.mean


def _average_written_in_training(network: Any, y: Tensor) -> Tensor:
    z = y - network.mean
    if network.training:
        network.mean.copy_(0.9 * network.mean + 0.1 * y.detach().mean(0))
    return z


def _count(network: Any, y: Tensor) -> Tensor:
    network.count = network.count + 1
    return y


def _count_in_training(network: Any, y: Tensor) -> Tensor:
    return _count(network, y) if network.training else y


def _count_in_evaluation(network: Any, y: Tensor) -> Tensor:
    return y if network.training else _count(network, y)


def _count_in_place(network: Any, y: Tensor) -> Tensor:
    network.count += 1
    return y


def _count_batches(network: Any, y: Tensor) -> Tensor:
    network.num_batches_tracked = network.num_batches_tracked + 1
    return y


def _previous(network: Any, y: Tensor) -> Tensor:
    z = y - network.mean
    network.mean = y.detach().mean(0)
    return z


def _last(network: Any, y: Tensor) -> Tensor:
    network.mean = y.detach().mean(0)
    return y - network.mean


def _table(network: Any, y: Tensor) -> Tensor:
    if network.table is None or network.table.shape[0] != y.shape[1]:
        network.table = torch.arange(y.shape[1]) / 8
    return y + network.table


def _same_again(network: Any, y: Tensor) -> Tensor:
    network.mean = network.mean.clone()
    return y + network.mean


def prepare(network: nn.Module, mode: str) -> nn.Module:
    return get_mode(mode).prepare(network, Example((X,)), Recipe(mode, "x86"))


@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize(("between", "name"), [(_average, "mean"), (_count, "count"), (_previous, "mean")])
def test_a_value_that_the_next_call_reads_is_refused_by_its_name(
    mode: str, between: Callable[[Any, Tensor], Tensor], name: str
) -> None:
    with pytest.raises(TraceError, match=rf"mode='{mode}' .*a new value to '0\.{name}' with .*self\.{name}\.copy_"):
        prepare(nn.Sequential(Network(between)), mode)


@pytest.mark.parametrize("between", [_average_in_training, _count_in_training, _count_in_evaluation])
def test_so_is_one_that_is_assigned_only_in_training_or_evaluation(between: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(TraceError, match=r"assigns a new value to '(mean|count)'"):
        prepare(Network(between), "pt2e")


def test_a_trace_of_fx_does_not_see_an_addition_in_place() -> None:
    with pytest.raises(TraceError, match="assigns a new value to 'count'"):
        prepare(Network(_count_in_place), "fx")


@pytest.mark.parametrize(
    ("mode", "between"),
    [
        *((mode, _average_written) for mode in GRAPHS),
        ("pt2e", _count_in_place),
        ("pt2e", _average_written_in_training),
    ],
)
def test_what_is_written_into_a_buffer_is_carried_on(mode: str, between: Callable[[Any, Tensor], Tensor]) -> None:
    network = Network(between)
    reference = copy.deepcopy(network).train()
    prepared = prepare(network, mode).train()
    for _ in range(2):
        prepared(X)
        reference(X)
    for name in ("mean", "count"):
        assert torch.allclose(prepared.state_dict()[name], reference.state_dict()[name], atol=1e-2), name
    assert reference.mean.any() or reference.count


@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize("between", [_last, _table, _same_again, _count_batches])
def test_what_each_call_makes_alike_may_be_assigned(mode: str, between: Callable[[Any, Tensor], Tensor]) -> None:
    network = Network(between)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    prepared = prepare(network, mode)
    assert all(torch.equal(prepared.state_dict()[name], value) for name, value in before.items())


class Counts(nn.Module):
    """Without layers, and with a decision that no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 1e9:
            return x
        self.count = self.count + 1
        return x * self.count


def test_a_module_that_a_graph_of_fx_calls_as_a_whole_may_assign_its_buffers() -> None:
    prepared = prepare(nn.Sequential(nn.Linear(8, 8), Counts(), nn.Linear(8, 8)), "fx").train()
    for _ in range(3):
        prepared(X)
    assert prepared.state_dict()["1.count"] == 3


def test_a_batch_on_which_the_network_cannot_train_is_no_error() -> None:
    get_mode("fx").prepare(Network(_table), Example((X[:1],)), Recipe("fx", "x86"))


@pytest.mark.parametrize("mode", GRAPHS)
def test_without_training_only_evaluation_counts(mode: str) -> None:
    recipe = Recipe(mode, "x86", kind="weight_only")
    quantize(Network(_average_in_training), Example((X,)), recipe)
    with pytest.raises(TraceError, match="assigns a new value to 'mean'"):
        quantize(Network(_average), Example((X,)), recipe)
