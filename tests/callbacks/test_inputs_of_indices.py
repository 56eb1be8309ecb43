"""Networks with inputs that are indices into others, so that a part of a call is not a call: graphs, bags, segments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import NetworkError
from qat_lightning.modes.decomposed.compiling import difference
from qat_lightning.settings.backends import get_backend
from tests.callbacks.lit import qat, trainer

pytestmark = pytest.mark.usefixtures("without_compiler")

CLASSES = 2
GRAPHS = 3


class OfGraphs(nn.Module):
    """Passes one round of messages along the edges of several graphs, and classifies each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: nn.Module = nn.Embedding(5, 8)
        self.message = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, edges: Tensor, of_edges: Tensor, graph: Tensor) -> Tensor:
        states, (source, target) = self.nodes(x), edges
        messages = self.message(torch.cat([states[source], states[target], of_edges], -1))
        states = torch.zeros(x.shape[0], 8).index_add(0, target, messages)
        return self.head(torch.zeros(GRAPHS, 8).index_add(0, graph, states))


def graphs(nodes: int, edges: int) -> dict[str, Tensor]:
    return {
        "x": torch.randint(5, (nodes,)),
        "edges": torch.cat([torch.arange(nodes).repeat(2, 1), torch.randint(nodes, (2, edges - nodes))], 1),
        "of_edges": torch.randn(edges, 4),
        "graph": torch.arange(nodes) % GRAPHS,
    }


class OfBags(nn.Module):
    """Classifies weighted bags of indices, which are given one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode="sum")
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        return self.layers(self.bag(index, offsets, per_sample_weights=weights))


def bags(indices: int = 60) -> dict[str, Tensor]:
    offsets = torch.arange(0, indices, indices // GRAPHS)
    return {"index": torch.randint(20, (indices,)), "offsets": offsets, "weights": torch.rand(indices)}


class OfSegments(nn.Module):
    """Classifies sequences that are packed into one, with the places where each begins and the last one ends."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor, positions: Tensor, bounds: Tensor) -> Tensor:
        values = self.layers(x) + positions[:, None]
        sums = torch.cat([torch.zeros(1, CLASSES), values.cumsum(0)])
        return sums[bounds[1:]] - sums[bounds[:-1]]


def segments() -> dict[str, Tensor]:
    return {"x": torch.randn(50, 4), "positions": torch.rand(50), "bounds": torch.tensor([0, 10, 35, 50])}


class Classifier(LightningModule):
    """Trains a network that takes the entries of a batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(**batch), torch.arange(GRAPHS) % CLASSES)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def one_by_one(*batches: dict[str, Tensor]) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def fitted_and_tested(
    net: nn.Module, callback: QuantizationAwareTraining, train: DataLoader[Any], test: DataLoader[Any]
) -> None:
    module, run = Classifier(net), trainer(callback, max_epochs=1)
    run.fit(module, train)
    [tested] = run.test(module, test, verbose=False)
    assert tested["test/loss"] > 0
    assert all(row.quantized for row in callback.quantized.coverage if row.kind == "Linear")


@pytest.mark.parametrize("given", [False, True], ids=["recorded", "given"])
@pytest.mark.parametrize("mode", ["eager", "fx", "auto"])
def test_more_indices_than_samples_of_an_example_are_no_obstacle(mode: str, given: bool) -> None:
    for net, call in ((OfGraphs(), graphs(40, 120)), (OfBags(), bags()), (OfSegments(), segments())):
        callback = qat(mode, **({"example_inputs": call} if given else {}))
        fitted_and_tested(net, callback, one_by_one(call, call), one_by_one(call))


class Limited(OfGraphs):
    """Has a graph for each number of edges, because it refuses too many."""

    def forward(self, x: Tensor, edges: Tensor, of_edges: Tensor, graph: Tensor) -> Tensor:
        if edges.shape[1] > 1000:
            raise ValueError("too many edges")
        return super().forward(x, edges, of_edges, graph)


def graphs_made(callback: QuantizationAwareTraining) -> int:
    return len(callback.prepared.__dict__["_made_for"])


class BySource(OfGraphs):
    """Takes features of nodes, and both ends of the edges apart."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = nn.Linear(3, 8)

    def forward(  # type: ignore[override]
        self, x: Tensor, source: Tensor, target: Tensor, of_edges: Tensor, graph: Tensor
    ) -> Tensor:
        states = self.nodes(x)
        messages = self.message(torch.cat([states[source], states[target], of_edges], -1))
        states = torch.zeros(x.shape[0], 8).index_add(0, target, messages)
        return self.head(torch.zeros(GRAPHS, 8).index_add(0, graph, states))


def by_source(nodes: int, edges: int) -> dict[str, Tensor]:
    call = graphs(nodes, edges)
    source, target = call.pop("edges")
    return call | {"x": torch.randn(nodes, 3), "source": source, "target": target}


@pytest.mark.parametrize(("net", "calls"), [(OfGraphs, graphs), (BySource, by_source)], ids=["edges", "ends"])
def test_one_graph_runs_any_number_of_nodes_and_edges(net: Any, calls: Any) -> None:
    callback = qat("fx")
    train = one_by_one(*(calls(12 + number, 30 + 3 * number) for number in range(3)))
    fitted_and_tested(net(), callback, train, one_by_one(calls(20, 70)))
    assert graphs_made(callback) == 0


@pytest.mark.parametrize("kind", ["static", "weight_only"])
def test_another_graph_is_made_from_the_whole_call(kind: Any) -> None:
    """A few of the nodes, with all of the edges, are not a call of the network."""
    callback = qat("fx", kind=kind)
    train = one_by_one(graphs(12, 30), graphs(14, 33))
    fitted_and_tested(Limited(), callback, train, one_by_one(graphs(14, 36)))


class LooksIfLarge(OfGraphs):
    """Looks at values where there are many edges, which no graph can."""

    def forward(self, x: Tensor, edges: Tensor, of_edges: Tensor, graph: Tensor) -> Tensor:
        if edges.shape[1] > 30 and of_edges.abs().max() > 1000:
            raise ValueError("an outlier")
        return super().forward(x, edges, of_edges, graph)


def test_a_refusal_of_another_size_names_the_mode_that_works() -> None:
    train = one_by_one(graphs(12, 30), graphs(12, 33))
    with pytest.raises(NetworkError, match="mode='eager', which needs no graph"):
        trainer(qat("fx"), max_epochs=1).fit(Classifier(LooksIfLarge()), train)
    fitted_and_tested(LooksIfLarge(), qat("eager"), train, train)


def test_kernels_of_mode_pt2e_are_tried_on_the_whole_call() -> None:
    callback, call = qat("pt2e", runtime="plain"), graphs(12, 30)
    fitted_and_tested(OfGraphs(), callback, one_by_one(call, call), one_by_one(graphs(14, 30)))
    network: Any = callback.quantized.network
    assert network.runs == "onednn"
    tensors = network.spec.flatten((), call)
    target = get_backend("x86", "pt2e")
    assert difference(network.decomposed, network.decomposed, network.spec, tensors, target) == ""
