"""Parts of a network that stay in evaluation mode during training, by override or by flag, keep doing so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.training_flags import plain_train
from qat_lightning.modes.prepared import fake_quantizers
from tests.callbacks.lit import CLASSES, MODES, Lit, loader, qat, trainer


class KeepsStatistics(nn.Module):
    """BatchNorm after the convolution is always in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.train()

    def train(self, mode: bool = True) -> KeepsStatistics:
        super().train(mode)
        self.body[1].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Part(nn.Module):
    """Contains such a network, and a BatchNorm that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = KeepsStatistics()
        self.norm = nn.BatchNorm1d(144)
        self.head = nn.Linear(144, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(x).flatten(1)))


class OnceSet(Part):
    """Sets the flag without overriding anything."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = KeepsStatistics().body
        self.inner[1].eval()


class Calling(Lit):
    """Calls ``train`` before every epoch on a network that overrides it."""

    calls = True

    def on_train_epoch_start(self) -> None:
        if self.calls:
            self.net.train()


@pytest.mark.parametrize("make", [Part, OnceSet])
@pytest.mark.parametrize("mode", MODES)
def test_statistics_that_are_kept_stay_kept(mode: str, make: Callable[[], nn.Module]) -> None:
    """Like the float run, with a validation between the epochs."""
    torch.manual_seed(0)
    module, callback = Calling(make()), qat(mode)
    module.calls = make is Part
    trainer(callback).fit(module, loader(), loader())
    found: dict[str, Any] = dict(module.net.named_buffers())
    kept = next(name for name in found if name.startswith("inner") and name.endswith("1.num_batches_tracked"))
    assert found[kept] == 0
    assert found["norm.num_batches_tracked"] == 8
    assert all(fq.training for _, fq in fake_quantizers(module.net)) or mode == "eager"
    assert callback.quantized is not None


def test_train_is_plain_for_a_while_only() -> None:
    network = KeepsStatistics()
    with plain_train(network):
        assert network.train().body[1].training
    assert not network.train().body[1].training
