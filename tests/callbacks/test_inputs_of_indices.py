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
from tests.callbacks.lit import qat, trainer

pytestmark = pytest.mark.usefixtures("without_compiler")

CLASSES = 2
GRAPHS = 3


class OfGraphs(nn.Module):
    """Passes one round of messages along the edges of several graphs, and classifies each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = nn.Embedding(5, 8)
        self.message = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, edges: Tensor, of_edges: Tensor, graph: Tensor) -> Tensor:
        states, (source, target) = self.nodes(x), edges
        messages = self.message(torch.cat([states[source], states[target], of_edges], -1))
        states = torch.zeros_like(states).index_add(0, target, messages)
        return self.head(torch.zeros(GRAPHS, states.shape[1], device=x.device).index_add(0, graph, states))


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
