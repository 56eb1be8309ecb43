"""Under manual optimization the schedule counts the actual steps of the quantized network's optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from tests.callbacks.lit import CLASSES, Lit, assert_same_state, loader, qat, trainer
from tests.callbacks.test_schedule_in_trainer import FROZEN, ROUNDING, Watch


class Accumulates(Lit):
    """Steps manually with every fourth batch."""

    every = 4
    wrapped = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
        self.manual_backward(super().training_step(batch, batch_idx) / self.every)
        if batch_idx % self.every == self.every - 1:
            optimizer.step()
            optimizer.zero_grad()


class Unwrapped(Accumulates):
    """Uses torch's optimizer, whose steps Lightning does not count."""

    wrapped = False


class Adversaries(Lit):
    """A quantized network that steps with every second batch, and a float one that steps three times per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(CLASSES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        ours, theirs = self.optimizers()
        for _ in range(3):
            theirs.zero_grad()
            self.manual_backward(self.critic(self.net(batch[0]).detach()).mean())
            theirs.step()
        if batch_idx % 2:
            ours.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            ours.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), lr=0.01), torch.optim.SGD(self.critic.parameters(), lr=0.01)]


@pytest.mark.parametrize(
    ("make", "schedule", "batch"),
    [
        (Accumulates, {"start": 0.5}, 8),
        (Accumulates, {"start": {"step": 2}}, 8),
        (Accumulates, {"start": 2}, 8),
        (Unwrapped, {"start": {"step": 3}}, 12),
        (Adversaries, {"start": 0.5}, 8),
        (Adversaries, {"start": {"step": 3}}, 6),
    ],
    ids=str,
)
def test_points_follow_the_steps_of_the_network_that_is_quantized(make: Any, schedule: Any, batch: int) -> None:
    """16 batches in 4 epochs."""
    watch, callback = Watch(), qat(module="net", **schedule)
    trainer(callback, watch, max_epochs=4).fit(make(), loader(), loader())
    assert watch.first(ROUNDING) == batch
    assert callback.quantized is not None


@pytest.mark.parametrize("limit", [{"max_steps": 24}, {"max_steps": 24, "max_epochs": 100}], ids=str)
def test_a_share_of_a_training_that_is_limited_in_steps_counts_all_of_them(limit: dict[str, int]) -> None:
    """7 steps of both networks in two batches, 3 of them in the first: 24 follow 7 batches, 12 follow 4."""
    watch = Watch()
    trainer(qat(module="net", start=0.5), watch, **{"max_epochs": -1} | limit).fit(Adversaries(), loader(), loader())
    assert watch.first(ROUNDING) == 4


@pytest.mark.parametrize("make", [Accumulates, Adversaries])
def test_a_resumed_fit_counts_on(make: Any, tmp_path: Path) -> None:
    schedule = {"module": "net", "start": {"step": 3}, "freeze_batchnorm": 0.8}
    ended, watch = [], Watch()
    for resumed in (False, True):
        torch.manual_seed(0)
        module = make()
        saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        others = [watch] if resumed else [saving]
        trainer(qat(**schedule), *others, max_epochs=4, enable_checkpointing=not resumed).fit(
            module, loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt" if resumed else None
        )
        ended.append(module.state_dict())
    assert_same_state(*ended)
    assert watch.first(ROUNDING) == (4 if make is Accumulates else 0)
    assert watch.first(FROZEN) == 5


def test_a_checkpoint_of_before_steps_were_counted_counts_them_alike(tmp_path: Path) -> None:
    fitting = trainer(qat(module="net", start={"step": 3}), max_epochs=1)
    fitting.fit(Accumulates(), loader(), loader())
    fitting.save_checkpoint(tmp_path / "old.ckpt")
    saved = torch.load(tmp_path / "old.ckpt", weights_only=True)
    for state in saved["callbacks"].values():
        state.pop("schedule", None)
    torch.save(saved, tmp_path / "old.ckpt")
    watch = Watch()
    again = trainer(qat(module="net", start={"step": 3}), watch, max_epochs=5)
    again.fit(Accumulates(), loader(), loader(), ckpt_path=tmp_path / "old.ckpt")
    assert watch.first(ROUNDING) == 8  # 1 step before, 2 in these


def test_the_epoch_that_weight_averaging_adds_is_not_planned() -> None:
    watch = Watch()
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=2)
    trainer(qat("eager", start=0.5, freeze_batchnorm=0.9), averaging, watch, max_epochs=3).fit(
        Lit(), loader(), loader()
    )
    assert watch.first(ROUNDING) == 6


@pytest.mark.parametrize("averaging_first", [True, False])
@pytest.mark.parametrize("point", [1.0, 3, {"step": 12}])
def test_the_epoch_that_weight_averaging_adds_reaches_no_point(point: Any, averaging_first: bool) -> None:
    """Its statistics are then estimated without rounding, as those of a float run are."""
    found = []
    for quantizing in ([], [qat("eager", start=point, freeze_batchnorm=point, freeze_observers=point)]):
        torch.manual_seed(0)
        module, watch = Lit(), Watch()
        callbacks = [*quantizing, StochasticWeightAveraging(0.01, swa_epoch_start=2)]
        watching = [watch] if quantizing else []
        fitting = trainer(*(callbacks[::-1] if averaging_first else callbacks), *watching, max_epochs=3)
        fitting.fit(module, loader(), loader())
        found.append({key: value for key, value in module.state_dict().items() if "running" in key})
    assert {row[0] for row in watch.seen} == {0, 1, 2, 3}, "the added epoch is the last"
    assert watch.first(ROUNDING) is watch.first(FROZEN) is None
    fake_quant, plain = found[::-1]
    assert all(torch.equal(fake_quant[key], value) for key, value in plain.items())
