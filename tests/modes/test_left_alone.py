"""What preparation, conversion and verification leave as it is: buffers that a forward changes, and random states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.bias_range import hold_biases
from qat_lightning.modes.coverage import flops_of
from qat_lightning.modes.decomposed.lowering import on_plain_kernels
from qat_lightning.modes.parts import check as parts_check
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.recording import RunsApart, run_of
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.modes.whole import Disturbance
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe

MODES = ("eager", "fx", "pt2e")
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("without_compiler")


class Stateful(nn.Module):
    """Counts its calls, and adds a running average of a layer's output to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.count.add_(1)
        self.average.mul_(0.9).add_(0.1 * y.detach().mean(0))
        return self.last(F.relu(y + self.average) * self.count)


def state(network: nn.Module) -> dict[str, Tensor]:
    """The buffers of `Stateful`, whatever the module in a mode's network that holds them."""
    buffers = {name.rpartition(".")[2]: buffer.clone() for name, buffer in network.named_buffers()}
    return {name: buffers[name] for name in ("count", "average")}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class MaximumNorm(nn.Linear):
    """Constrains its weight in each call, as the last layer of EEGNet does."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(x)


@pytest.mark.filterwarnings("error:There is no report", "error:Multiply-accumulates were not counted")
def test_parameters_whose_data_forward_assigns_get_their_own_back_and_are_reported() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), MaximumNorm(8, 8))
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    mode, example = get_mode("eager"), Example((X,))
    prepared = mode.prepare(network, example, Recipe("eager", "x86"))
    assert [(row.name, row.quantized) for row in mode.coverage(prepared, example)][:2] == [("0", True), ("2", False)]
    assert all(torch.equal(prepared.state_dict()[name], value) for name, value in weights.items())
    prepared.train()(X)
    assert prepared.get_submodule("2").weight.norm(dim=1).max() <= 0.1001


@pytest.mark.parametrize("mode", MODES)
def test_buffers_are_those_of_the_training(mode: str) -> None:
    torch.manual_seed(0)
    network = Stateful()
    before = state(network)
    prepared = get_mode(mode).prepare(network, Example((X,)), Recipe(mode, "x86"))
    assert same_state(state(prepared), before)
    assert same_state(state(network), before), "its parts are those of the prepared network"
    for _ in range(3):
        prepared.train()(X)
    trained = state(prepared)
    assert trained["count"] == 3
    evaluated = cpu_copy(prepared)
    result: Converted = get_mode(mode).convert(cpu_copy(prepared), Example((X,)))
    assert same_state(state(prepared), trained)
    assert same_state(state(result.network), trained)
    for _ in range(2):
        assert sqnr_db(evaluated(X), result.network(X)) > 40
    assert state(result.network)["count"] == 5


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
@pytest.mark.parametrize("mode", MODES)
def test_buffers_are_those_of_the_float_network(mode: str, kind: Any) -> None:
    network = Stateful()
    before = state(network)
    made = quantize(network, Example((X,)), Recipe(mode, "x86", kind=kind)).network
    assert same_state(state(network), before)
    assert same_state(state(made), before)
    assert sqnr_db(network.eval()(X), made(X)) > 30


def test_a_search_for_modules_that_only_act_in_training_leaves_buffers() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and torch.rand(()).item() < 0.1:
                return torch.zeros_like(x)
            return x

    class Dropped(Stateful):
        def __init__(self) -> None:
            super().__init__()
            self.drop = Drops()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.drop(x))

    prepared = get_mode("fx").prepare(Dropped(), Example((X,)), Recipe("fx", "x86"))
    assert state(prepared)["count"] == 0


def test_choosing_the_kernels_of_a_graph_leaves_its_buffers() -> None:
    recipe = Recipe("pt2e", "x86")
    prepared = get_mode("pt2e").prepare(Stateful(), Example((X,)), recipe)
    prepared.train()(X)
    network: Any = get_mode("pt2e").convert(cpu_copy(prepared), Example((X,))).network
    on_plain_kernels(network.decomposed, [X], recipe.target)
    assert state(network)["count"] == 1


def test_buffers_of_parts_are_those_of_the_training() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Stateful()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) if x.sum().item() < 1e6 else x

    prepared = get_mode("parts").prepare(Decides(), Example((X,)), Recipe("parts", "x86"))
    assert state(prepared)["count"] == 0
    prepared.train()(X)
    trained = state(prepared)
    evaluated = cpu_copy(prepared)
    network = get_mode("parts").convert(cpu_copy(prepared), Example((X,))).network
    assert same_state(state(network), trained)
    compared = parts_check._Comparison(evaluated, network, ["part"], Example((X,)))
    assert sqnr_db(compared.replayed(Disturbance(0)), compared.expected) > 30
    assert same_state(state(network), trained)
    assert same_state(state(evaluated), trained)


def test_the_run_that_reads_scales_of_inputs_leaves_buffers_and_random_numbers() -> None:
    class Counts(nn.Sequential):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(*layers)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return super().forward(x + torch.rand(()))

    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.quantize_per_tensor(x, 0.1, 128, torch.quint8)

    layer = torch.ao.nn.quantized.Linear(8, 8)
    weight = torch.quantize_per_tensor(torch.ones(8, 8), 1e-9, 0, torch.qint8)
    layer.set_weight_bias(weight, torch.ones(8))
    network, drawn = Counts(Rounds(), layer).eval(), torch.get_rng_state()
    assert hold_biases(network, Example((X,))) == ["1"]
    assert network.count == 0
    assert torch.equal(torch.get_rng_state(), drawn)


class Steps(nn.Module):
    """A layer that graphs call as a whole, with a counter inside."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x * self.count.item()  # a tensor without values cannot be asked


def graph_of(root: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    count = graph.get_attr("count")
    graph.call_method("add_", (count, 1))
    again = graph.get_attr("count")
    graph.output((again, graph.call_module("steps", (x,))))
    graph.lint()
    return graph


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.steps = Steps()


def test_each_run_of_a_graph_begins_with_the_same_buffers_and_keeps_its_values() -> None:
    root = Root()
    for _ in range(2):
        values = run_of(root, graph_of(root), [X])
        assert values["output"][0] == 1
        assert torch.equal(values["steps"], X)
    result = RunsApart(fx.GraphModule(root, graph_of(root))).run(X)
    assert result[0] == 1, "also where the result is a buffer"
    assert root.count == root.steps.count == 0


def test_counting_the_operations_of_a_layer_leaves_its_buffers() -> None:
    root = Root()
    graph = graph_of(root)
    (node,) = graph.find_nodes(op="call_module")
    flops_of(node, {"x": X}, root)
    assert root.steps.count == 0


class Draws(nn.Module):
    """Draws random numbers in each call; has a linear function, and a BatchNorm for upstream to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.weight = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Parameter(torch.randn(8, 8))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.norm(self.first(x))), self.weight)


@pytest.mark.parametrize("mode", MODES)
def test_random_numbers_of_the_process_stay_as_they_are(mode: str) -> None:
    network, drawn = Draws(), torch.get_rng_state()
    prepared = get_mode(mode).prepare(network, Example((X,)), Recipe(mode, "x86"))
    assert torch.equal(torch.get_rng_state(), drawn)
    prepared.train()(X)
    copied, drawn = cpu_copy(prepared), torch.get_rng_state()
    get_mode(mode).convert(copied, Example((X,)))
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("mode", MODES)
def test_random_numbers_of_gpus_stay_as_they_are(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    network, drawn = Draws(), torch.get_rng_state()
    quantize(network, Example((X,)), Recipe(mode, "x86", kind="dynamic"))
    assert torch.equal(torch.get_rng_state(), drawn)
    if mode == "eager":
        rehearse(network, Example((X,)), Recipe(mode, "x86"))
    assert seeded == []
