"""Fits of networks with transposed convolutions: resumed bit by bit, compiled, converted, saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qat_lightning import load_quantized
from qat_lightning.graph.example import Example
from qat_lightning.modes import compiling
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import Lit, assert_same_state, loader, qat, state, trainer
from tests.modes.test_fx_transposed import SmallUNet

MODES = ("eager", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("fx", "pt2e")))


def net() -> SmallUNet:
    torch.manual_seed(0)
    network = SmallUNet()
    network(next(iter(loader()))[0])
    return network


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_goes_on_where_it_was(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, module = qat(mode), Lit(net())
    trainer(whole, saving, enable_checkpointing=True).fit(module, loader())
    again, resumed = qat(mode), Lit(net())
    trainer(again).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert whole.quantized is not None
    assert again.quantized is not None
    (row,) = [row for row in whole.quantized.coverage if row.name == "up"]
    assert row.quantized
    assert_same_state(state(module), state(resumed))
    images, _ = next(iter(loader()))
    whole.quantized.save(tmp_path / "network.int8")
    loaded = load_quantized(tmp_path / "network.int8", network=net())
    assert torch.equal(loaded(images), again.quantized(images))


class OfOneSample(nn.Module):
    """Takes a sample out of the batch, and has a BatchNorm over another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv1d(8, 8, 1), nn.ConvTranspose1d(8, 8, 3, 2, 1, 1)
        self.norm, self.last = nn.BatchNorm1d(8), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.up(self.first(x)[0]))[None])
        return y


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_one_sample_without_a_batch(mode: str) -> None:
    torch.manual_seed(0)
    network, example, recipe = OfOneSample(), Example((torch.randn(4, 8, 4),)), Recipe(mode, "x86")
    nn.init.uniform_(network.norm.running_mean, -1, 1)  # type: ignore[arg-type]
    prepared = get_mode(mode).prepare(network, example, recipe)
    calibrate(prepared, [example])
    converted = get_mode(mode).convert(cpu_copy(prepared), example)
    assert {row.name: row.quantized for row in converted.coverage} == {
        "first": True,
        "up": mode == "eager",
        "last": True,
    }
    assert min(check.sqnr_db for check in converted.checks) >= 60


@pytest.mark.slow
def test_steps_are_compiled_in_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    states = []
    for compile in (False, True):
        module, callback = Lit(net()), qat("eager", compile=compile)
        trainer(callback, max_epochs=1).fit(module, loader(32))
        assert callback.quantized is not None
        states.append(state(module))
    for key, value in states[0].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-3)
