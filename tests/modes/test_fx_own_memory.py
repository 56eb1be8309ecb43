"""Numbers in which a forward counts: mode fx refuses those that it computes with, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe
from tests.modes.carried import prepared_as_float

pytestmark = pytest.mark.usefixtures("without_compiler")

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Step = Callable[[Any, Tensor], Tensor]


class Network(nn.Module):
    """Two layers, and between them a step that may count its calls."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.step = nn.Linear(6, 8), nn.Linear(8, 4), step
        self.count, self.on, self.size, self.log = 0, False, 0, {"calls": 0}
        self.register_buffer("counted", torch.zeros(()))
        self.counter = Counter()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(self, self.first(x)))


def _anneals(network: Any, y: Tensor) -> Tensor:
    network.count += int(network.training)
    return y * (1 + 0.1 * network.count)


def _warms_up(network: Any, y: Tensor) -> Tensor:
    network.count += 1
    return y * min(1.0, network.count / 5000)


def _begins_late(network: Any, y: Tensor) -> Tensor:
    network.count += 1
    return F.relu(y) if network.count > 100 else y


def _takes_turns(network: Any, y: Tensor) -> Tensor:
    network.on = not network.on
    return F.relu(y) if network.on else y


def _drops_more(network: Any, y: Tensor) -> Tensor:
    network.count += 1
    return F.dropout(y, min(0.5, 0.01 * network.count), network.training)


def _makes_a_tensor(network: Any, y: Tensor) -> Tensor:
    network.count += 1
    return y * torch.full((8,), 1.0 + network.count)


def _counts_in_a_dictionary(network: Any, y: Tensor) -> Tensor:
    network.log["calls"] += 1
    return y * network.log["calls"]


def _counts_what_it_creates(network: Any, y: Tensor) -> Tensor:
    network.created = getattr(network, "created", 0) + 1
    return y * network.created


REFUSED = {
    _anneals: "count", _warms_up: "count", _begins_late: "count", _takes_turns: "on", _drops_more: "count",
    _makes_a_tensor: "count", _counts_in_a_dictionary: "log", _counts_what_it_creates: "created",
}  # fmt: skip


@pytest.mark.parametrize("step", REFUSED, ids=lambda step: step.__name__.strip("_"))
def test_a_number_that_every_call_changes_and_computes_with_is_refused(step: Step) -> None:
    network = Network(step)
    with pytest.raises(TraceError, match=f"changes '{REFUSED[step]}' with every call and computes with it"):
        get_mode("fx").prepare(network, Example((X,)), Recipe("fx", "x86"))
    assert (network.count, network.on) == (0, False)


def _notes_what_it_saw(network: Any, y: Tensor) -> Tensor:
    network.count += 1
    network.seen = getattr(network, "seen", 0) + y.shape[0]
    network.shape = y.shape[1:]
    network.log["calls"] += 1
    if network.count % 2 == 0:
        network.noted = network.count
    return y


def _builds_a_table_once(network: Any, y: Tensor) -> Tensor:
    if network.size < y.shape[1]:
        network.size, network.table = y.shape[1], 0.1 * torch.arange(y.shape[1])
    return y + network.table[: y.shape[1]]


class Counter(nn.Module):
    """Decides by values, so that a graph calls it as a whole."""

    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x if float(x.detach().sum()) > 1e9 else 1.5 * x


def _calls_a_module_that_counts(network: Any, y: Tensor) -> Tensor:
    return network.counter(network.counter(y)) if y.shape[1] > 5 else y


def _counts_in_a_buffer(network: Any, y: Tensor) -> Tensor:
    network.counted.add_(1)
    return y * (1 + 0.1 * network.counted)


def _counts_training_in_a_buffer(network: Any, y: Tensor) -> Tensor:
    network.counted.add_(int(network.training))
    return y * (1 + 0.1 * network.counted)


FOLLOWED = [
    _notes_what_it_saw, _builds_a_table_once, _calls_a_module_that_counts, _counts_in_a_buffer,
    _counts_training_in_a_buffer,
]  # fmt: skip


@pytest.mark.parametrize("step", FOLLOWED, ids=lambda step: step.__name__.strip("_"))
def test_what_a_forward_notes_or_counts_in_buffers_may_change(step: Step) -> None:
    prepared_as_float(Network(step), X)


class Cached(nn.Module):
    """Looks its bias up in training, and keeps it by device in evaluation, as timm's TinyViT and EfficientViT do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(6, 8), nn.Parameter(torch.randn(4, 8))
        self.kept: dict[str, Tensor] = {}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.training:
            bias = self.table[2]
        else:
            if "cpu" not in self.kept:
                self.kept["cpu"] = self.table[2]
            bias = self.kept["cpu"]
        return self.layer(x) + bias


def test_what_a_forward_keeps_in_a_container_is_not_of_its_trace() -> None:
    network = Cached()
    prepared = get_mode("fx").prepare(network, Example((X,)), Recipe("fx", "x86"))
    assert network.kept == {}
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    with torch.no_grad():
        assert torch.allclose(prepared.train()(X), network.train()(X), atol=1e-6)
        network.table.add_(1)
        assert torch.allclose(prepared.eval()(X), network.eval()(X), atol=1e-6)
