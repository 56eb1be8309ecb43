"""Fits of networks with transposed convolutions: resumed bit by bit, converted, saved, in every mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from qat_lightning import load_quantized
from tests.callbacks.lit import Lit, assert_same_state, loader, qat, state, trainer
from tests.modes.test_fx_transposed import SmallUNet

MODES = ("fx", "eager", "pt2e")


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
