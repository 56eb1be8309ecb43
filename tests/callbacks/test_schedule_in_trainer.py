"""The schedule in a real Trainer: what is enabled at which optimizer step, and what is updated when."""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from qat_lightning import Scheme
from qat_lightning.errors import ConfigurationError
from qat_lightning.layers.qat_modules import FreezableBatchNorm
from qat_lightning.modes.prepared import fake_quantizers
from tests.callbacks.lit import MODES, Lit, assert_same_state, loader, qat, ranges, statistics, trainer


class Watch(Callback):
    """Records the layers' flags for each batch, by optimizer step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, bool, bool, bool]] = []

    def on_before_zero_grad(self, *args: Any) -> None:
        """Override a hook, so that Lightning calls the callback."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        fqs = [fq for _, fq in fake_quantizers(pl_module)]
        norms = [module for module in pl_module.modules() if isinstance(module, FreezableBatchNorm)]
        (rounding,) = {fq.fake_quant_enabled for fq in fqs}
        (observing,) = {fq.observer_enabled for fq in fqs}
        (frozen,) = {norm.frozen for norm in norms}
        self.seen.append((trainer.current_epoch, trainer.fit_loop.total_batch_idx, rounding, observing, frozen))

    def first(self, what: int) -> int | None:
        """The batch, counted over epochs from 0, from which on something has changed permanently."""
        changed = [row[what] != (what == 3) for row in self.seen]
        assert changed == sorted(changed), "it went back"
        return changed.index(True) if True in changed else None


ROUNDING, OBSERVING, FROZEN = 2, 3, 4


@pytest.mark.parametrize(
    ("schedule", "settings", "batches"),
    [
        ({"start": 1, "freeze_observers": 2, "freeze_batchnorm": 2}, {"max_epochs": 3}, (4, 8, 8)),
        ({"start": {"step": 3}, "freeze_observers": {"step": 5}}, {"max_epochs": 2}, (3, 5, None)),
        ({"start": 0.5, "freeze_observers": 0.75, "freeze_batchnorm": 0.9}, {"max_epochs": 2}, (4, 6, None)),
        ({"start": 0.5, "freeze_batchnorm": 0.8}, {"max_epochs": 2, "limit_train_batches": 2}, (2, None, None)),
        ({"start": 0.5}, {"max_steps": 6, "max_epochs": -1}, (3, None, None)),
        ({"start": 0.5}, {"max_epochs": 2, "val_check_interval": 1}, (4, None, None)),
        ({"start": None}, {"max_epochs": 1}, (None, None, None)),
        # 2 batches to a step, and the last step of an epoch may have fewer
        ({"start": {"step": 1}, "freeze_batchnorm": 1}, {"max_epochs": 2, "accumulate_grad_batches": 2}, (2, None, 4)),
        ({"start": 0.5}, {"max_epochs": 2, "accumulate_grad_batches": 3}, (4, None, None)),
    ],
    ids=str,
)
def test_points_act_before_their_step(
    schedule: dict[str, Any], settings: dict[str, Any], batches: tuple[int | None, ...]
) -> None:
    watch = Watch()
    trainer(qat(**schedule), watch, **settings).fit(Lit(), loader(), loader())
    assert (watch.first(ROUNDING), watch.first(OBSERVING), watch.first(FROZEN)) == batches


def test_fractions_under_an_accumulation_that_changes() -> None:
    """4 + 2 + 1 steps in 3 epochs: half of them are done after the first step of epoch 1."""
    watch = Watch()
    accumulation = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    trainer(qat(start=0.7), accumulation, watch, max_epochs=3).fit(Lit(), loader())
    assert watch.first(ROUNDING) == 4 + 2  # step 5 of 7


class TwoOptimizers(Lit):
    """Steps twice per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        body, head = self.optimizers()
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        body.step()
        head.step()

    def configure_optimizers(self) -> Any:
        body = [p for name, p in self.named_parameters() if "head" not in name]
        head = [p for name, p in self.named_parameters() if "head" in name]
        return [torch.optim.SGD(body, lr=0.01), torch.optim.SGD(head, lr=0.01)]


@pytest.mark.parametrize(
    ("start", "settings", "batch"),
    [({"step": 3}, {"max_epochs": 2}, 3), (0.5, {"max_epochs": 2}, 4), (0.5, {"max_steps": 12, "max_epochs": -1}, 3)],
)
def test_several_optimizers_step_for_one_batch(start: Any, settings: dict[str, Any], batch: int) -> None:
    watch = Watch()
    trainer(qat(start=start), watch, **settings).fit(TwoOptimizers(), loader())
    assert watch.first(ROUNDING) == batch


class Moves(Callback):
    """Whether ranges and statistics changed, in each training epoch and validation."""

    def __init__(self) -> None:
        self.moved: dict[str, list[tuple[bool, bool]]] = {"train": [], "val": []}
        self._before: dict[str, dict[str, dict[str, Tensor]]] = {}

    def _begin(self, what: str, pl_module: LightningModule) -> None:
        self._before[what] = {"ranges": ranges(pl_module), "statistics": statistics(pl_module)}

    def _end(self, what: str, pl_module: LightningModule) -> None:
        def moved(kind: str, now: dict[str, Tensor]) -> bool:
            # The least value behind a ReLU is always 0, and a range that nothing was seen for says nothing.
            keys = [key for key, value in now.items() if not key.endswith("min_val") and torch.isfinite(value).all()]
            each = [not torch.equal(self._before[what][kind][key], now[key]) for key in keys]
            # The input has the same batches in every epoch, and its mean range stays where it was after the first.
            assert sum(each) >= len(each) - 1 or not any(each), "some did and some did not"
            return any(each)

        self.moved[what].append((moved("ranges", ranges(pl_module)), moved("statistics", statistics(pl_module))))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("train", pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("val", pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("val", pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("train", pl_module)


@pytest.mark.parametrize("mode", MODES)
def test_ranges_and_statistics_move_in_training_only_and_until_they_freeze(mode: str) -> None:
    """Validation runs between epochs; ranges freeze with epoch 2, BatchNorm, fused or not, with epoch 3."""
    moves = Moves()
    callback = qat(mode, start=1, freeze_observers=2, freeze_batchnorm=3)
    trainer(callback, moves, max_epochs=4, num_sanity_val_steps=2).fit(Lit(), loader(), loader())
    assert moves.moved["train"] == [(True, True), (True, True), (False, True), (False, False)]
    assert moves.moved["val"] == [(False, False)] * 5


@pytest.mark.parametrize("mode", MODES)
def test_until_it_starts_a_run_is_a_float_run(mode: str) -> None:
    """Recording an example, preparing and observing change neither weights nor random states, bit by bit."""
    ended, first_batches = [], []
    for callbacks in ([], [qat(mode, start=None, convert_on_fit_end=False)]):
        torch.manual_seed(0)
        module, batches = Lit(), []
        module.net.drop.p = 0.3
        keep = LambdaCallback(on_train_batch_start=lambda *args, batches=batches: batches.append(args[2][0]))
        trainer(*callbacks, keep).fit(module, loader(shuffle=True), loader())
        ended.append({k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)})
        first_batches.append(batches)
    plain, observed = ended
    assert all(torch.equal(left, right) for left, right in zip(*first_batches, strict=True))
    assert_same_state(plain, {key: observed[key] for key in plain})


@pytest.mark.parametrize("mode", MODES)
def test_shares_of_least_error_are_chosen_by_the_weights_at_the_start(mode: str) -> None:
    seen: dict[int, list[bool]] = {}

    def look(run: Trainer, *_: Any) -> None:
        kept = [fq.clip.all().item() for _, fq in fake_quantizers(run.lightning_module) if "clip" in fq._buffers]
        seen[run.global_step] = kept

    scheme = Scheme(weight_bits=4, weight_observer="mse")
    run = trainer(qat(mode, scheme=scheme, start={"step": 2}), LambdaCallback(on_train_batch_end=look), max_epochs=1)
    run.fit(Lit(), loader())
    assert seen[1]
    assert not any(seen[1] + seen[2])
    assert all(seen[3])


def test_curves_are_logged_at_their_steps(tmp_path: Path) -> None:
    schedule = {"start": {"step": 2}, "freeze_observers": {"step": 5}, "freeze_batchnorm": {"step": 6}}
    logger = CSVLogger(tmp_path)
    trainer(qat(**schedule), logger=logger, log_every_n_steps=1).fit(Lit(), loader(), loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["quant/fake_quant_enabled"]]
    curves = [
        [float(row[f"quant/{key}"]) for row in rows]
        for key in ("fake_quant_enabled", "observers_enabled", "batchnorm_frozen")
    ]
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert curves == [[0.0] * 2 + [1.0] * 6, [1.0] * 5 + [0.0] * 3, [0.0] * 6 + [1.0] * 2]


def test_what_was_reached_stays_in_a_longer_second_fit() -> None:
    module, callback = Lit(), qat(start=0.5, freeze_batchnorm=0.75)
    trainer(callback, max_epochs=2).fit(module, loader())
    watch = Watch()
    trainer(callback, watch, max_epochs=5).fit(module, loader())
    assert (watch.first(ROUNDING), watch.first(FROZEN)) == (0, 0)


@pytest.mark.parametrize("before", ["validate", "test", "predict"])
def test_an_evaluation_before_the_fit_reaches_nothing(before: str) -> None:
    module, callback, watch = Lit(), qat(start=1), Watch()
    settings = {"verbose": False} if before != "predict" else {}
    getattr(trainer(callback), before)(module, loader(), **settings)
    trainer(callback, watch).fit(module, loader())
    assert watch.first(ROUNDING) == 4


def test_a_fraction_of_an_endless_plan_is_refused_before_training() -> None:
    module, watch = Lit(), Watch()
    with pytest.raises(ConfigurationError, match=r"start=\{fraction: 0\.5\} is a fraction of the planned training"):
        trainer(qat(start=0.5), watch, max_epochs=-1).fit(module, loader())
    assert watch.seen == []


@pytest.mark.parametrize(
    "settings",
    [{"freeze_observers": 0}, {"start": -1}, {"start": 1.5}, {"start": {"steps": 3}}, {"freeze_batchnorm": "soon"}],
    ids=str,
)
def test_a_point_that_is_none_is_refused_at_construction(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        qat(**settings)


class Scores(Lit):
    """Logs a score that is best while the network is float."""

    def on_train_epoch_end(self) -> None:
        self.log("score", 1.0 / (1 + self.current_epoch))


@pytest.mark.parametrize("reset", [False, True])
def test_the_best_checkpoint_is_one_of_the_network_that_rounds(reset: bool, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="{epoch}", save_on_train_epoch_end=True)
    stop = EarlyStopping("score", mode="max", patience=3, check_on_train_epoch_end=True)
    callback = qat(start=2, reset_best_on_start=reset)
    fitting = trainer(callback, stop, best, max_epochs=5, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fitting.fit(Scores(), loader())
    older = [text for text in map(str, (one.message for one in said)) if "enabled (start={epoch: 2})" in text]
    assert [best.best_model_path in text and "reset_best_on_start=True" in text for text in older] == [True] * (
        not reset
    )
    assert Path(best.best_model_path).name == ("epoch=2.ckpt" if reset else "epoch=0.ckpt")
    assert fitting.current_epoch == (5 if reset else 4)
    assert stop.best_score == (1 / 3 if reset else 1.0)


@pytest.mark.parametrize("make", [Lit, TwoOptimizers])
def test_fast_dev_run(make: Callable[[], Lit]) -> None:
    callback = qat(start=0.3, freeze_observers=0.7, freeze_batchnorm=0.7)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(callback, fast_dev_run=True).fit(make(), loader(), loader())
    assert callback.quantized is not None
    assert not [one for one in said if "start=" in str(one.message)], "one step reaches nothing"


def test_a_checkpoint_knows_that_an_older_one_is_the_best(tmp_path: Path) -> None:
    """The warning is given at the end of the resumed fit too."""
    settings: dict[str, Any] = {
        "monitor": "score",
        "mode": "max",
        "filename": "{epoch}",
        "save_on_train_epoch_end": True,
    }
    first = ModelCheckpoint(tmp_path, save_last=True, **settings)
    trainer(qat(start=1), first, max_epochs=2, enable_checkpointing=True).fit(Scores(), loader())
    resumed = trainer(qat(start=1), ModelCheckpoint(tmp_path, **settings), max_epochs=3, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"epoch=0.ckpt, is from before .* \(start={epoch: 1}\)"):
        resumed.fit(Scores(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))


def test_ranges_frozen_before_rounding_begins_are_warned_of() -> None:
    says = r"freeze_observers=\{epoch: 1\} \(step 4\) comes before start=\{epoch: 2\} \(step 8\)"
    with pytest.warns(UserWarning, match=says):
        trainer(qat(start=2, freeze_observers=1), max_epochs=3).fit(Lit(), loader())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*comes before start.*")
        for settings in ({"start": 1, "freeze_observers": 1}, {"start": 1, "freeze_observers": {"step": 9}}):
            trainer(qat(**settings), max_epochs=3).fit(Lit(), loader())


class Breaks(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 3:
            raise ValueError("a mistake")
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss


@pytest.mark.parametrize("saves", [False, True])
def test_an_interruption_names_a_checkpoint_only_if_there_is_one(
    saves: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = qat(start=0)
    others = [ModelCheckpoint(tmp_path, every_n_train_steps=2)] if saves else []
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="a mistake"):
        trainer(callback, *others, max_epochs=2, enable_checkpointing=saves).fit(Breaks(), loader())
    assert "was interrupted at step 3 by ValueError" in caplog.text
    (path,) = [*map(str, tmp_path.glob("*.ckpt"))] or [""]
    says = f"resume with trainer.fit(..., ckpt_path={path!r})" if saves else "no checkpoint was written to resume from"
    assert says in caplog.text
    callback.convert()
    assert callback.quantized is not None, "as the message says"


def test_a_trainer_that_has_counted_the_steps_of_another_model_is_reported() -> None:
    run = trainer(qat(start=0.5), max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has already counted")
        module = Lit()
        run.fit(module, loader())
        run.fit_loop.max_epochs = 2
        run.fit(module, loader())
    run.fit_loop.epoch_progress.reset()
    with pytest.warns(UserWarning, match="already counted 8 steps of another model.* Use a new Trainer for each model"):
        run.fit(Lit(), loader())
