"""A LightningModule that reaches layers of its network by index, in each stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.callbacks.lit import CLASSES, MODES, Lit, loader, qat, trainer

pytestmark = pytest.mark.usefixtures("without_compiler")


class ByIndex(Lit):
    """Clips a layer as a WGAN does, and adds the norm of all to the loss."""

    def __init__(self) -> None:
        layers = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, CLASSES)
        super().__init__(nn.Sequential(*layers))
        self.norms: list[float] = []

    def norm(self) -> Tensor:
        assert [isinstance(self.net[place], kind) for place, kind in ((0, nn.Conv2d), (4, nn.Linear))] == [True, True]
        norms = [layer.weight.norm() for layer in self.net if hasattr(layer, "weight")]
        assert len(norms) == 3
        return torch.stack(norms).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 1e-4 * self.norm()

    def on_train_batch_end(self, *args: Any) -> None:
        self.net[0].weight.data.clamp_(-0.05, 0.05)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.norms.append(float(self.norm()))


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_layers_are_reached_by_index_in_a_fit_and_in_the_test_of_int8(mode: str) -> None:
    module = ByIndex()
    run = trainer(qat(mode))
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert module.net.get_submodule("0").weight.abs().max() <= 0.05
    assert module.norms == [float(module.norm())] * 4
