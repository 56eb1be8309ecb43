"""What a forward sets in its layers: the graph of mode fx follows training flags, and refuses what it cannot follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import QuantizationAwareTraining
from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe
from tests.modes.carried import prepared_as_float

pytestmark = pytest.mark.usefixtures("without_compiler")

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 4
Step = Callable[[Any, Tensor], Tensor]


class Network(nn.Module):
    """Two convolutions, and a step of a forward before them."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.drop, self.head, self.step = nn.Dropout(0.5), nn.Linear(8, 4), step

    def forward(self, x: Tensor) -> Tensor:
        x = self.step(self, x)
        return self.head(self.drop(self.features(x).mean((2, 3))))


def _evaluates_features(network: Any, x: Tensor) -> Tensor:
    network.features.eval()
    return x


def _evaluates_one_layer(network: Any, x: Tensor) -> Tensor:
    network.features[1].train(False)
    return x


def _evaluates_dropout(network: Any, x: Tensor) -> Tensor:
    network.drop.eval()
    return x


def _evaluates_by_type(network: Any, x: Tensor) -> Tensor:
    network.apply(lambda module: module.eval() if isinstance(module, nn.BatchNorm2d) else module)
    return x


def _evaluates_everything(network: Any, x: Tensor) -> Tensor:
    network.eval()
    return F.dropout(x, 0.5, network.training)


def _writes_into_the_data(network: Any, x: Tensor) -> Tensor:
    network.head.weight.data.copy_(torch.renorm(network.head.weight.data, p=2, dim=0, maxnorm=0.3))
    return x


FOLLOWED = [_evaluates_features, _evaluates_one_layer, _evaluates_dropout, _evaluates_by_type, _evaluates_everything]


@pytest.mark.parametrize("step", [*FOLLOWED, _writes_into_the_data], ids=lambda step: step.__name__.strip("_"))
def test_a_graph_trains_with_what_forward_sets(step: Step) -> None:
    prepared_as_float(Network(step), IMAGES)


def test_layers_that_forward_evaluates_stay_there_whatever_sets_their_flags() -> None:
    prepared = get_mode("fx").prepare(Network(_evaluates_features), Example((IMAGES,)), Recipe("fx", "x86"))
    norm: Any = prepared.get_submodule("features.1")
    for module in prepared.train().modules():
        module.training = True
    copied = copy.deepcopy(prepared)
    for network in (prepared, copied):
        network(IMAGES)
        assert network.get_submodule("features.1").training is False
    assert norm.num_batches_tracked == 0


class Transfer(LightningModule):
    """The pattern of Lightning's documentation of transfer learning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.extractor = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.extractor.eval()
        with torch.no_grad():
            features = self.extractor(x).flatten(1)
        return self.classifier(features)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_frozen_feature_extractor_trains_as_without_quantization() -> None:
    states = []
    for callbacks in ([], [QuantizationAwareTraining(mode="fx", start={"step": 3}, convert_on_fit_end=False)]):
        module = Transfer()
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks,
            enable_progress_bar=False, enable_model_summary=False, limit_train_batches=2, max_steps=3,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4))
        states.append(module.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)


def _sets_momentum(network: Any, x: Tensor) -> Tensor:
    network.features[1].momentum = 0.5
    return x


def _drops_in_evaluation(network: Any, x: Tensor) -> Tensor:
    network.drop.train()
    return x


def _drops_once(network: Any, x: Tensor) -> Tensor:
    network.drop.eval()
    x = network.drop(x)
    network.drop.train(network.training)
    return x


def _assigns_data(network: Any, x: Tensor) -> Tensor:
    network.head.weight.data = torch.renorm(network.head.weight.data, p=2, dim=0, maxnorm=0.3)
    return x


def _assigns_data_of_a_value(network: Any, x: Tensor) -> Tensor:
    x = x * 1
    x.data = x.data.clamp(0, 1)
    return x


REFUSED = {
    "'momentum' of 'features.1'": _sets_momentum,
    "'drop' to training in evaluation": _drops_in_evaluation,
    "'drop' both in training and in evaluation": _drops_once,
    r"weight\.data = .*does not assign data to a tensor": _assigns_data,
    r"x\.data = .*does not assign data to a tensor": _assigns_data_of_a_value,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_graph_cannot_follow_is_refused(message: str) -> None:
    network = Network(REFUSED[message])
    weights = copy.deepcopy(network.state_dict())
    with pytest.raises(TraceError, match=message):
        get_mode("fx").prepare(network, Example((IMAGES,)), Recipe("fx", "x86"))
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
