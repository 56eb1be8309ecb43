"""Weights that other code changes after a fit: what is tested and saved is int8 of the present ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qat_lightning import load_quantized
from tests.callbacks.lit import Lit, dataset, loader, qat, state, trainer

IMAGES, LABELS = dataset().tensors


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_weights_loaded_by_hand_are_what_is_tested_and_saved(mode: str, tmp_path: Path) -> None:
    module, callback = Lit(), qat(mode)
    run = trainer(callback)
    run.fit(module, loader())
    kept = state(module)
    (before,) = run.test(module, loader(), verbose=False)
    module.load_state_dict({key: value * 0.5 if key.endswith("weight") else value for key, value in kept.items()})
    (changed,) = run.test(module, loader(), verbose=False)
    assert changed["test/loss"] != pytest.approx(before["test/loss"], rel=0.05)
    assert callback.fidelity["sqnr_db"] > 40
    (expected,) = run.validate(module, loader(), verbose=False)
    assert changed["test/loss"] == pytest.approx(expected["val/loss"], rel=1e-3)
    module.load_state_dict(kept)
    network = callback.quantized
    if mode == "fx":
        callback.save(tmp_path / "model.int8")
        network = load_quantized(tmp_path / "model.int8")
    assert F.cross_entropy(network(IMAGES), LABELS).item() == pytest.approx(before["test/loss"], rel=1e-5)


def test_a_further_fit_without_the_callback_is_converted() -> None:
    module, callback = Lit(), qat()
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader())
    first = callback.quantized
    trainer(max_epochs=2).fit(module, loader())
    (tested,) = run.test(module, loader(), verbose=False)
    assert not torch.equal(callback.quantized(IMAGES), first(IMAGES))
    assert callback.fidelity["sqnr_db"] > 40
    assert tested["test/loss"] == pytest.approx(F.cross_entropy(callback.quantized(IMAGES), LABELS).item(), rel=1e-5)
