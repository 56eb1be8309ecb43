"""Networks of one LightningModule of which the second reads what the first computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining
from tests.callbacks.lit import CLASSES, MODES, Lit, loader, trainer


class InARow(Lit):
    """The first ends in a layer whose output has a grid of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)))
        self.other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.net(x))


@pytest.mark.parametrize("make", [QuantizationAwareTraining, PostTrainingQuantization], ids=["qat", "ptq"])
@pytest.mark.parametrize("mode", MODES)
def test_each_is_int8_and_equals_fake_quant(mode: str, make: Any) -> None:
    torch.manual_seed(0)
    module, callback = InARow(), make(mode, module=["net", "other"])
    fitting = trainer(callback, max_epochs=1)
    fitting.fit(module, loader())
    layers = {row.name: row.quantized for network in callback.quantized.values() for row in network.coverage}
    assert layers == dict.fromkeys(["1", "0", "2"], True)
    fitting.test(module, loader(), verbose=False)
    assert callback.fidelity["agreement"] > 0.95
    assert callback.fidelity["sqnr_db"] > 20
