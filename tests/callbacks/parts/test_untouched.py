"""Steps that are only tried, for an example or to calibrate, leave no trace in the LightningModule."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from qat_lightning import PostTrainingQuantization
from qat_lightning.callbacks.parts.untouched import nothing_moves
from tests.callbacks.lit import Lit, loader, qat, trainer

NOISE = 8


class Adversarial(LightningModule):
    """A generator and a discriminator that take turns, each toggled as Lightning's documentation does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(NOISE, 16), nn.ReLU(), nn.Linear(16, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
        self.discriminator[0].bias.requires_grad_(False)

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def _generate(self, optimizer: Any, real: Tensor) -> None:
        self._learn(optimizer, lambda: -self.discriminator(self(torch.randn(len(real), NOISE))).mean())

    def _discriminate(self, optimizer: Any, real: Tensor) -> None:
        self._learn(optimizer, lambda: F.softplus(-self.discriminator(real)).mean())

    def _learn(self, optimizer: Any, loss: Any) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss())
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, other = self.optimizers()
        real = batch[0].flatten(1)
        self.log("lr", one.param_groups[0]["lr"])
        self._generate(one, real)
        self._discriminate(other, real)
        self.lr_schedulers().step()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("size", self(torch.randn(4, NOISE)).abs().mean())

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(part.parameters()) for part in (self.generator, self.discriminator)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1, 0.5)]


class DiscriminatorFirst(Adversarial):
    """The generator is called after the first optimizer step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, other = self.optimizers()
        self._discriminate(other, batch[0].flatten(1))
        self._generate(one, batch[0].flatten(1))
        self.lr_schedulers().step()


@pytest.mark.parametrize("make", [Adversarial, DiscriminatorFirst])
@pytest.mark.parametrize("named", ["generator", ["generator", "discriminator"]])
@pytest.mark.parametrize("callback", [PostTrainingQuantization, qat])
def test_toggled_optimizers_train_as_without_the_callback(make: Any, named: Any, callback: Any) -> None:
    torch.manual_seed(0)
    alone = make()
    plain = trainer()
    plain.fit(alone, loader())
    torch.manual_seed(0)
    module = make()
    run = trainer(callback(module=named))
    run.fit(module, loader())
    assert run.global_step == plain.global_step > 0
    assert run.optimizers[0].param_groups[0]["lr"] == plain.optimizers[0].param_groups[0]["lr"]
    assert {n: p.requires_grad for n, p in module.named_parameters()} == {
        n: p.requires_grad for n, p in alone.named_parameters()
    }
    assert module._param_requires_grad_state == {}
    if callback is PostTrainingQuantization:
        assert all(torch.equal(p, q) for p, q in zip(module.parameters(), alone.parameters(), strict=True))
    run.test(module, loader(), verbose=False)


class Keeping(Lit):
    """Keeps what its steps found in all the places that a LightningModule has for it."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.by_name: dict[str, list[float]] = defaultdict(list)
        self.last: deque[float] = deque(maxlen=3)
        self.labels: Counter[int] = Counter()
        self.seen = set[int]()
        self.steps = 0
        self.sum, self.table = torch.zeros(()), np.zeros(2)
        self.meter, self.hidden = MeanMetric(), [MeanMetric(), nn.BatchNorm1d(1)]
        self.register_buffer("calls", torch.zeros(()))
        self.epochs: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        value = loss.detach()
        self.losses.append(value)
        self.by_name["loss"].append(float(value))
        self.last.append(float(value))
        self.labels.update(batch[1].tolist())
        self.seen.add(self.steps)
        self.steps += 1
        self.sum += value
        self.table[0] += 1
        self.meter.update(value)
        self.hidden[0].update(value)  # type: ignore[operator]
        self.hidden[1](value.reshape(1, 1).expand(2, 1))
        self.calls = self.calls + 1
        if not hasattr(self, "watched"):
            self.watched = self.net.head.register_forward_hook(lambda *_: None)
        return loss

    def kept(self) -> Any:
        tensors = [self.sum, self.calls, self.meter.mean_value, self.meter.weight, self.hidden[0].weight]
        counts = [len(self.losses), len(self.last), self.labels, len(self.seen), self.steps, self.table[0]]
        hooks, updates = len(self.net.head._forward_hooks), self.meter._update_count
        batches = int(self.hidden[1].num_batches_tracked)
        lists = {name: len(values) for name, values in self.by_name.items()}
        return [float(t) for t in tensors], copied(counts), hooks, updates, batches, lists, hasattr(self, "watched")

    def on_train_epoch_end(self) -> None:
        self.epochs.append(self.kept())
        self.losses.clear()


def copied(values: list[Any]) -> list[Any]:
    return [dict(value) if isinstance(value, dict) else value for value in values]


def test_what_steps_keep_in_attributes_is_that_of_the_training_alone() -> None:
    found = []
    for callbacks in ([], [PostTrainingQuantization(calibration_batches=3)]):
        torch.manual_seed(0)
        module = Keeping()
        trainer(*callbacks).fit(module, loader())
        found.append((module.epochs, module.kept()))
    assert found[0] == found[1]


def test_a_recipe_at_the_end_of_training_adds_nothing_to_the_last_epoch() -> None:
    module = Keeping()
    run = trainer(qat(bias_correction_batches=2))
    run.fit(module, loader())
    assert [epoch[1][0] for epoch in module.epochs] == [run.num_training_batches] * run.max_epochs
    assert module.steps == run.global_step


def test_what_is_restored_stays_the_same_object() -> None:
    class Watching(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            objects = [pl_module.losses, pl_module.sum, pl_module.calls]
            with nothing_moves(pl_module):
                pl_module.training_step(next(iter(trainer.train_dataloader)), 0)
                pl_module.losses = []
            assert all(
                one is other
                for one, other in zip(objects, [pl_module.losses, pl_module.sum, pl_module.calls], strict=True)
            )
            assert "log" not in pl_module.__dict__

    module = Keeping()
    trainer(Watching(), max_epochs=1).fit(module, loader())
    assert module.steps
