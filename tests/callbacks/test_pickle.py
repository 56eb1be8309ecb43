"""Pickling the callback and the LightningModule, for another process or later use."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.errors import QuantizationError
from tests.callbacks.lit import CLASSES, MODES, Lit, assert_same_state, dataset, loader, qat, state, trainer
from tests.callbacks.test_insert import OwnForward

IMAGES = dataset()[:32][0]


class Pooling(nn.Module):
    """Functions that cannot be pickled, and a weight that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.weight = nn.Parameter(torch.randn(CLASSES, 32) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return F.linear(F.adaptive_avg_pool2d(x, 2).flatten(1), self.weight)


def fitted(mode: str, module: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    callback = qat(mode, start=1)
    trainer(callback).fit(module, loader())
    return callback, module


@pytest.mark.parametrize("make", [Lit, OwnForward, lambda: Lit(Pooling())], ids=["net", "own forward", "functions"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_pickled_together(mode: str, make: Any) -> None:
    """They test the same, continue like the originals, and share nothing with them."""
    callback, module = fitted(mode, make())
    again, other = pickle.loads(pickle.dumps((callback, module)))
    assert_same_state(state(other), state(module))
    assert torch.equal(again.quantized(IMAGES), callback.quantized(IMAGES))
    assert again.quantized.source == callback.quantized.source
    assert torch.equal(again.network("float")(IMAGES), callback.network("float")(IMAGES))
    for variant in ("float", "fake_quant", "int8"):
        callback.use_variant(variant)
        again.use_variant(variant)
        expected = trainer(callback).test(module, loader(), verbose=False)
        assert trainer(again).test(other, loader(), verbose=False) == expected
        assert again.fidelity == callback.fidelity
    before = state(other)
    for one, lit in ((callback, module), (again, other)):
        torch.manual_seed(1)
        trainer(one, max_epochs=1).fit(lit, loader())
        if lit is module:
            assert_same_state(state(other), before)
    assert_same_state(state(other), state(module))
    assert torch.equal(again.quantized(IMAGES), callback.quantized(IMAGES))


@pytest.mark.parametrize("mode", MODES)
def test_a_pickled_lightning_module_goes_on_with_a_new_callback(mode: str) -> None:
    callback, module = fitted(mode, Lit())
    expected = trainer(callback).test(module, loader(), verbose=False)
    other = pickle.loads(pickle.dumps(module))
    assert trainer(qat(mode)).test(other, loader(), verbose=False) == expected
    trainer(qat(mode)).fit(other, loader())


def test_before_the_fit() -> None:
    again = pickle.loads(pickle.dumps(qat("fx", start={"step": 2}, exclude=["net.head"])))
    trainer(again).fit(Lit(), loader())
    assert again.quantized.recipe.exclude == ("net.head",)


def test_an_int8_network_by_itself() -> None:
    callback, _ = fitted("fx", Lit())
    with pytest.raises(QuantizationError, match=r"save\(path\)"):
        pickle.dumps(callback.quantized)
    callback, _ = fitted("pt2e", Lit())
    assert torch.equal(pickle.loads(pickle.dumps(callback.quantized))(IMAGES), callback.quantized(IMAGES))
