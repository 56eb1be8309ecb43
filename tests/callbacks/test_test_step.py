"""Before training, ``test_step`` is tried as far as the call of the prepared network."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from qat_lightning.errors import NetworkError
from tests.callbacks.lit import Lit, Net, assert_same_state, loader, qat, state, trainer


class Softened(Net):
    """Has an argument that only the test gives."""

    def forward(self, x: Tensor, soft: bool = False) -> Tensor:
        scores = super().forward(x)
        return self.soften(scores) if soft else scores


class Softens(Lit):
    def __init__(self) -> None:
        super().__init__(Softened())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/size", self.net(batch[0], soft=True).abs().mean())


class CallsAPart(Lit):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/size", self.net.features(batch[0]).abs().mean())


class OtherBatches(Lit):
    """Fails with a batch of the training, before the network is called."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch["labelled"], batch_idx)


class Untested(Lit):
    test_step = LightningModule.test_step  # type: ignore[assignment]


class Writes(Lit):
    """Does something with the outputs that cannot be undone."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self.write = outputs.append

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.write(self(batch[0]))


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize("make", [Softens, CallsAPart])
def test_a_call_that_fails_after_training_is_reported_before(make: Any, mode: str) -> None:
    module, run = make(), trainer(qat(mode, start=0.5), max_epochs=1)
    with pytest.warns(UserWarning, match="test_step fails with a batch of the training data"):
        run.fit(module, loader())
    with pytest.raises(NetworkError):
        run.test(module, loader(), verbose=False)


@pytest.mark.parametrize("make", [Softens, CallsAPart])
def test_the_mode_that_the_report_names_works(make: Any) -> None:
    module, run = make(), trainer(qat("eager"), max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="test_step fails")
        run.fit(module, loader())
    run.test(module, loader(), verbose=False)


@pytest.mark.parametrize("make", [Lit, OtherBatches])
def test_nothing_else_is_reported(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="test_step fails")
        trainer(qat(), max_epochs=1).fit(make(), loader())


def test_the_step_ends_with_the_call_and_changes_nothing() -> None:
    outputs: list[Tensor] = []
    states = []
    for make in (Untested, lambda: Writes(outputs)):
        torch.manual_seed(0)
        module = make()
        module.net = Net(dropout=0.5)
        trainer(qat(), max_epochs=1).fit(module, loader())
        states.append(state(module))
    assert not outputs
    assert_same_state(*states)
