"""Networks of ``module=[...]`` that share layers, such as a body with two heads."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from qat_lightning.callbacks.parts.find_networks import shared_layers
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import ConfigurationError
from tests.callbacks.lit import CLASSES, Lit, loader, state, trainer


class WithHead(nn.Module):
    def __init__(self, body: nn.Module, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Two(Lit):
    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.save_hyperparameters({"lr": 0.05})
        body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU())
        self.net, self.other = WithHead(body, CLASSES), WithHead(body, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y) + F.cross_entropy(self.other(x), y % 2)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))


SETTINGS: list[dict[str, Any]] = [{"mode": "eager"}, {"mode": "eager", "kind": "weight_only"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings.values()))
def test_layers_in_place_are_refused_twice_before_anything_changes_and_the_remedy_works(settings: Any) -> None:
    module, before = Two(), state(Two())
    with pytest.raises(ConfigurationError, match=r"'net' and 'other' share 'net\.body'") as refused:
        trainer(QuantizationAwareTraining(module=["net", "other"], **settings)).fit(module, loader())
    assert list(state(module)) == list(before)
    parts = ast.literal_eval(re.search(r"module=(\[.*?\])", str(refused.value)).group(1))
    assert parts == ["net.body", "net.head", "other.head"]
    qat = QuantizationAwareTraining(module=parts, **settings)
    run = trainer(qat)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert qat.fidelity["sqnr_db"] > 40
    assert all(row.quantized for network in qat.quantized.values() for row in network.coverage)


def test_graphs_share_a_body() -> None:
    module, qat = Two(), QuantizationAwareTraining(module=["net", "other"], mode="fx")
    trainer(qat).fit(module, loader())
    assert all(row.quantized for network in qat.quantized.values() for row in network.coverage if row.what == "layer")


def test_modules_without_parameters_may_be_shared() -> None:
    relu = nn.ReLU()
    one, other = nn.Sequential(nn.Linear(2, 2), relu), nn.Sequential(nn.Linear(2, 2), relu)
    assert shared_layers({"one": one, "other": other}) == ({}, ["one", "other"])
