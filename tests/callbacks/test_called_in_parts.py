"""Steps that call parts of a network and never the network itself, as those of a variational autoencoder do."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from qat_lightning import load_quantized
from qat_lightning.errors import NetworkError
from tests.callbacks.lit import Lit, loader, qat, trainer

PARTS = ["net.enc", "net.mu", "net.log_var", "net.dec"]


class Autoencoder(nn.Module):
    """Its steps call ``encode`` and ``dec``."""

    def __init__(self) -> None:
        super().__init__()
        self.dec = nn.Sequential(nn.Linear(4, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
        self.enc = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.mu, self.log_var = nn.Linear(16, 4), nn.Linear(16, 4)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.enc(x)
        return self.mu(hidden), self.log_var(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(self.encode(x)[0])


class LitAutoencoder(Lit):
    def __init__(self) -> None:
        super().__init__(Autoencoder())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_var = self.net.encode(batch[0])
        drawn = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return F.mse_loss(self.net.dec(drawn), batch[0]) + 1e-3 * (mean**2 + log_var.exp() - log_var).mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.training_step(batch, batch_idx))


class _OwnLayers(LightningModule):
    """Its own ``forward`` is the network, and its steps do not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.first, self.last = nn.Flatten(), nn.Linear(64, 8), nn.ModuleList([nn.Linear(8, 64)])

    def forward(self, x: Tensor) -> Tensor:
        return self.last[0](self.first(self.flat(x)).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.first(self.flat(batch[0])).relu()
        return F.mse_loss(self.last[0](hidden), self.flat(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def _named(lit: LightningModule, **settings: Any) -> list[str]:
    """The names that the error gives for ``module``."""
    with pytest.raises(NetworkError, match="calls only parts of") as error:
        trainer(qat(**settings)).fit(lit, loader())
    found = re.search(r"module=(\[.*\])", str(error.value))
    assert found is not None
    return ast.literal_eval(found[1])


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_the_error_names_the_parts_and_they_fit_test_and_save(mode: str, tmp_path: Path) -> None:
    assert _named(LitAutoencoder(), mode=mode) == PARTS
    lit, callback = LitAutoencoder(), qat(mode, module=PARTS)
    with_trainer = trainer(callback)
    with_trainer.fit(lit, loader())
    with_trainer.test(lit, loader(), verbose=False)
    assert callback.fidelity["sqnr_db"] > 40
    for name in PARTS:
        callback.quantized[name].save(tmp_path / name)
    codes = torch.randn(2, 4)
    again = load_quantized(tmp_path / "net.dec", network=Autoencoder().dec if mode == "eager" else None)
    assert torch.equal(again(codes), callback.quantized["net.dec"](codes))


def test_layers_of_the_lightning_module_itself() -> None:
    assert _named(_OwnLayers()) == ["first", "last.0"]
    trainer(qat(module=["first", "last.0"])).fit(_OwnLayers(), loader())


def test_of_several_networks_only_those_that_are_not_called_are_replaced() -> None:
    class Two(LitAutoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.critic(batch[0]).mean() ** 2

    assert _named(Two(), module=["critic", "net"]) == ["critic", *PARTS]
    trainer(qat(module=["critic", *PARTS])).fit(Two(), loader())


def test_a_part_within_another_is_not_named() -> None:
    class Inner(LitAutoencoder):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net.enc[1](batch[0].flatten(1)).mean() + super().training_step(batch, batch_idx)

    assert _named(Inner()) == PARTS


def test_a_test_that_never_calls_the_network_itself_says_why_fidelity_is_empty() -> None:
    lit, callback = LitAutoencoder(), qat("eager", example_inputs=torch.rand(4, 1, 8, 8))
    with_trainer = trainer(callback)
    with_trainer.fit(lit, loader())
    with pytest.warns(UserWarning, match="never called 'net' itself") as caught:
        with_trainer.test(lit, loader(), verbose=False)
    assert len([1 for warning in caught if "never called" in str(warning.message)]) == 1
    assert callback.fidelity == {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never called")
        plain, other = Lit(), qat("eager")
        with_trainer = trainer(other)
        with_trainer.fit(plain, loader())
        with_trainer.test(plain, loader(), verbose=False)
    assert other.fidelity
