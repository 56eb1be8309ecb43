"""Int8 networks with autocast, as Lightning tests them with ``precision="bf16-mixed"`` on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import Example, Recipe, Scheme, calibrate, convert, prepare, quantize
from tests.callbacks.lit import MODES, Lit, loader, qat, trainer


class Attending(nn.Module):
    """Float ops and a float layer between int8 layers, of types that autocast computes in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.last, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        tokens = x.flatten(2)
        weights = F.softmax(torch.bmm(tokens.transpose(1, 2), tokens), -1)
        x = self.middle(torch.bmm(tokens, weights).view_as(x))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@pytest.mark.parametrize("mode", ["eager", "fx", pytest.param("pt2e", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
def test_a_network_computes_the_same_within_autocast(kind: Any, mode: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 1, 8, 8)
    example, recipe = Example((images,)), Recipe(mode, "x86", Scheme(), kind=kind, exclude=("middle",))
    if kind == "static":
        prepared = prepare(Attending(), example, recipe)
        calibrate(prepared, [images])
        quantized = convert(prepared, example)
    else:
        quantized = quantize(Attending().eval(), example, recipe)
    wanted = quantized(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantized(images), wanted)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_in_mixed_precision_tests_a_network_with_float_layers(mode: str) -> None:
    callback = qat(mode, exclude=["net.middle"])
    run = trainer(callback, max_epochs=1, precision="bf16-mixed")
    run.fit(Lit(Attending()), loader())
    run.test(run.lightning_module, loader(), verbose=False)
    assert not {row.name: row.quantized for row in callback.quantized.coverage}["middle"]
    assert callback.fidelity["sqnr_db"] > 20
