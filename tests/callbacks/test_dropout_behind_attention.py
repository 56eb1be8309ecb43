"""Before fake-quantization is enabled, a fit is the plain one, including the masks of dropout behind attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qat_lightning.layers.transformer import PositionsFirst
from tests.callbacks.lit import MODES, qat, trainer


class _Attentive(nn.Module):
    """Attention with and without its weights, alone and in torch's layers, each with dropout behind it."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"batch_first": batch_first, "dropout": 0.3}
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, **sizes)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, **sizes)
        self.attention, self.drop = nn.MultiheadAttention(8, 2, **sizes), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        encoded = self.encoder(x)
        decoded = self.decoder(x, encoded)
        mixed, weights = self.attention(decoded, encoded, encoded)
        return self.drop(mixed) * weights.mean()


class _LitAttentive(LightningModule):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.net = _Attentive(batch_first)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _batches() -> DataLoader[Any]:
    return DataLoader(list(torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))), batch_size=None)


def _fitted(batch_first: bool, *callbacks: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    lit = _LitAttentive(batch_first)
    torch.manual_seed(1)
    trainer(*callbacks, max_epochs=1).fit(lit, _batches())
    return dict(lit.named_parameters())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_parameters_are_those_of_the_plain_fit(mode: str, batch_first: bool) -> None:
    plain = _fitted(batch_first)
    ours = _fitted(batch_first, qat(mode, start=1.0, convert_on_fit_end=False))
    assert plain.keys() == ours.keys()
    apart = {name: float((plain[name] - ours[name]).abs().max()) for name in plain}
    assert max(apart.values()) < 1e-6, apart


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_int8_copies_nothing_for_it(mode: str) -> None:
    callback = qat(mode)
    lit = _LitAttentive()
    trainer(callback, max_epochs=1).fit(lit, _batches())
    laid_out = [name for name, module in callback.quantized.named_modules() if isinstance(module, PositionsFirst)]
    assert not laid_out
    (x,) = list(_batches())[:1]
    for network in (lit.net.eval(), callback.quantized):
        with torch.no_grad():
            assert network(x).is_contiguous()
