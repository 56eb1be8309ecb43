"""Hooks on layers, whose values a LightningModule uses: in a fit, and in the test of the int8 network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat_lightning.errors import NetworkError
from tests.callbacks.lit import Lit, loader, qat, trainer

pytestmark = pytest.mark.usefixtures("without_compiler")


class FeatureLoss(Lit):
    """Penalizes the output of its convolution, which a hook stores, as large as it may be."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.smallest: list[float] = []
        self.net.features[0].register_forward_hook(self.store)

    def store(self, module: Any, args: Any, output: Tensor) -> None:
        self.features["conv"] = output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.features.clear()
        loss = F.cross_entropy(self(batch[0]), batch[1]) + 0.1 * self.features["conv"].pow(2).mean()
        self.smallest.append(float(self.features["conv"].detach().min()))
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.features.clear()
        super().test_step(batch, batch_idx)
        self.smallest.append(float(self.features["conv"].dequantize().min()))


def test_auto_takes_the_mode_in_which_hooks_see_what_they_see_in_float() -> None:
    """They see the convolution alone, whose values are of both signs; the method of the LightningModule is called."""
    smallest = []
    for callbacks in ([], [qat("auto", start={"epoch": 1})]):
        torch.manual_seed(0)
        module = FeatureLoss()
        fitting = trainer(*callbacks)
        fitting.fit(module, loader())
        fitting.test(module, loader(), verbose=False)
        smallest.append(module.smallest)
    assert smallest[1] == pytest.approx(smallest[0], rel=0.2)
    assert max(smallest[1]) < 0
    (callback,) = callbacks
    assert callback.quantized.recipe.mode == "eager"


class LateHook(Lit):
    def on_fit_start(self) -> None:
        self.net.features[0].register_forward_hook(lambda *call: None)


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_hook_on_a_merged_layer_that_comes_with_the_fit_is_refused_in_the_first_step(mode: str) -> None:
    run = trainer(qat(mode))
    with pytest.raises(NetworkError, match=r"A hook was registered on 'features\.0'.*mode='eager'"):
        run.fit(LateHook(), loader())
    assert run.global_step == 0
    trainer(qat("eager"), max_steps=1).fit(LateHook(), loader())
