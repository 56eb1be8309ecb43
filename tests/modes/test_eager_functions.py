"""Layers whose weights only functions use, in mode eager: the error names the mode that quantizes functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import NetworkError
from tests.callbacks.lit import Lit, loader, trainer


class Tied(nn.Module):
    """An autoencoder whose decoder has the weight of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(64, 16), nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.encoder(x.flatten(1)))
        return F.linear(hidden, self.encoder.weight.t(), self.bias).view_as(x)


class Autoencoder(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[0])


@pytest.mark.parametrize("settings", [{}, {"convert_on_fit_end": False}, {"rehearse": False}], ids=str)
def test_nothing_to_quantize_but_functions_names_fx_which_does(settings: dict[str, Any]) -> None:
    module = Autoencoder(Tied())
    with pytest.raises(NetworkError, match=r"encoder: its parameters are used by a function.* mode='fx'"):
        trainer(QuantizationAwareTraining(mode="eager", **settings)).fit(module, loader())
    qat = QuantizationAwareTraining(mode="fx", **settings)
    trainer(qat).fit(module, loader())
    assert all(row.quantized for row in qat.coverage if row.what == "layer")
