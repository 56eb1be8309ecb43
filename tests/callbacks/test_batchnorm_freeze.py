"""BatchNorm that freezes early gets the statistics of recent batches, in every mode."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from tests.callbacks.lit import MODES, Lit, Net, assert_same_state, loader, qat, statistics, trainer


class Scaled(Net):
    """The first layer's outputs are small, far from the initial running variance of 1."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.features[0].weight.mul_(0.05)
            self.features[0].bias.add_(0.3)


class WrittenOut(nn.BatchNorm2d):
    """A BatchNorm that calls ``F.batch_norm`` itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)


class Functional(Scaled):
    """BatchNorm with an activation, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.features[1] = WrittenOut(8)


class Seen(Callback):
    """Record the batch statistics after the first layer, and the running ones, before each batch."""

    def __init__(self) -> None:
        self.variances: list[torch.Tensor] = []
        self.running: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        net: Any = pl_module.net
        with torch.no_grad():
            layer = dict(net.named_modules())["features.0"]
            self.variances.append(nn.functional.conv2d(batch[0], layer.weight, layer.bias, 2).var((0, 2, 3)))
        self.running.append(net.state_dict()["features.1.running_var"].clone())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "make"), [*((mode, Scaled) for mode in MODES), ("pt2e", Functional)], ids=lambda value: str(value)
)
def test_statistics_are_those_of_the_recent_batches(mode: str, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Statistics of 6 batches, when half of them weigh less than the initial variance of 1."""
    seen = Seen()
    with caplog.at_level(logging.INFO):
        trainer(qat(mode, start=None, freeze_batchnorm={"step": 6}), seen).fit(Lit(make(), lr=1e-4), loader())
    *_, moving, frozen, last = seen.running
    own = torch.stack(seen.variances).mean(0)
    assert (moving / own).min() > 3
    torch.testing.assert_close(frozen, own, rtol=0.1, atol=0)
    assert torch.equal(frozen, last)
    assert "had not settled (in standard deviations: 'features.1' by" in caplog.text
    assert "replaced by those of the last 6 batches" in caplog.text


def test_what_has_settled_is_left_as_it_is_bit_by_bit() -> None:
    """Earlier batches do not matter: an average of few batches has settled after 21."""
    ended = []
    for known in (True, False):
        torch.manual_seed(0)
        module, callback = Lit(lr=1e-3), qat("eager", start=0.5, freeze_batchnorm=0.7)
        module.net.features[1].momentum = module.net.norm.momentum = 0.5
        forget = LambdaCallback(on_train_batch_start=lambda *_, c=callback: c._driver._batchnorm.forget())
        trainer(*([] if known else [forget]), callback, max_epochs=8).fit(module, loader())
        ended.append(module.state_dict())
    assert_same_state(*ended)


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_fit_freezes_with_the_same_statistics(mode: str, tmp_path: Path) -> None:
    """Interrupted within the window, whose beginning is in the checkpoint."""
    ended = []
    for resumed in (False, True):
        torch.manual_seed(0)
        module, saving = Lit(Scaled()), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        callback = qat(mode, start=0.5, freeze_batchnorm={"step": 14})
        trainer(callback, saving, max_epochs=4, enable_checkpointing=True).fit(
            module, loader(), ckpt_path=tmp_path / "epoch=2.ckpt" if resumed else None
        )
        ended.append(module.state_dict())
    assert_same_state(*ended)


def test_what_still_differs_is_said() -> None:
    """Frozen at the initial 0 and 1; after training no warning is given."""
    with pytest.warns(UserWarning, match=r"BatchNorm was frozen before step 0, and . of 2 layers .*features.1"):
        trainer(qat("eager", freeze_batchnorm=0), max_epochs=1).fit(Lit(Scaled()), loader())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="BatchNorm was frozen")
        trainer(qat("eager", freeze_batchnorm=0.8), max_epochs=10).fit(Lit(lr=1e-3), loader())


@pytest.mark.parametrize("mode", ["eager", "pt2e"])
def test_weight_averaging_estimates_statistics_that_are_frozen(mode: str) -> None:
    """In the last pass, over the averaged weights; reached schedule points stay reached."""
    torch.manual_seed(0)
    module, callback = Lit(), qat(mode, start=1, freeze_observers=0.7, freeze_batchnorm=0.7)
    fitting = trainer(callback, StochasticWeightAveraging(0.01, swa_epoch_start=2), max_epochs=4)
    fitting.fit(module, loader())
    assert fitting.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9
    assert callback.phase.batchnorm_frozen
    found = statistics(module)
    assert all((value != 0).any() for key, value in found.items() if key.endswith("running_mean"))
    assert {int(value) for key, value in found.items() if key.endswith("num_batches_tracked")} == {4}
