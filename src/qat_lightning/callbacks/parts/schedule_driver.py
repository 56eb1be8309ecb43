"""Applying a schedule to a running fit: counting steps, planning, and freezing BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from qat_lightning.callbacks.parts.batchnorm_freeze import BatchNormFreeze
from qat_lightning.callbacks.parts.between_processes import copy_buffers_from_first_process
from qat_lightning.callbacks.parts.steps import (
    StepCounter,
    batches_trained,
    planned_batches,
    share_done,
    training_plan,
)
from qat_lightning.processes import several_processes
from qat_lightning.settings.schedule import Phase, QuantizationSchedule, SchedulePoint, TrainingPlan, exact, resolve


class ScheduleDriver:
    """Determines the phase of a running fit, including after a resume from a checkpoint.

    Args:
        schedule: The schedule points.

    Attributes:
        schedule: As given.
        trains: Whether the present or last fit has trained a batch.
        new_networks: Whether networks were prepared that no fit has trained yet.
    """

    def __init__(self, schedule: QuantizationSchedule) -> None:
        self.schedule = schedule
        self.trains = False
        self.new_networks = False
        self._plan: TrainingPlan | None = None
        self._counter = StepCounter()
        self._batchnorm = BatchNormFreeze()

    def new_fit(self, trainer: Trainer) -> None:
        """Reset the state of an earlier fit, unless this fit continues it."""
        self.end()
        if not batches_trained(trainer):
            self._counter.forget()
            self._batchnorm.forget()

    def begin(self, trainer: Trainer, phase: Phase) -> None:
        """Plan the training, start counting steps, and warn of points that may never be reached.

        Args:
            trainer: The Trainer at the beginning of training, with its loops restored.
            phase: The phase reached before.
        """
        self.trains = False
        self._plan = training_plan(trainer)
        self._counter.begin(trainer)
        if self.new_networks and trainer.global_step and not trainer.ckpt_path:
            rank_zero_warn(
                f"This Trainer has already counted {trainer.global_step} steps of another model, and the schedule "
                "counts on from them: its points may come too early for this one. Use a new Trainer for each model."
            )
        self.new_networks = False
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a test of one step, which reaches nothing
        for message, grave in unreached(trainer, self.schedule, self._plan, phase):
            (rank_zero_warn if grave else rank_zero_info)(message)
        if message := frozen_too_early(self.schedule, self._plan):
            rank_zero_warn(message)

    def phase(self, trainer: Trainer, networks: Mapping[str, nn.Module]) -> tuple[int, Phase]:
        """Return the number of the next step, and the phase that the schedule gives for it."""
        assert self._plan is not None
        step = self._counter.steps(trainer, networks.values())
        return step, self.schedule.phase(step, trainer.current_epoch, self._plan, share_done(trainer))

    def before_batch(self, trainer: Trainer, networks: Mapping[str, nn.Module], phase: Phase) -> None:
        """Record BatchNorm statistics that a later freeze needs."""
        if self.schedule.freeze_batchnorm is not None and not phase.batchnorm_frozen:
            self._batchnorm.look(networks, batches_trained(trainer))

    def freeze_batchnorm(self, trainer: Trainer, networks: Mapping[str, nn.Module], step: int) -> None:
        """Prepare to freeze BatchNorm; all processes use the first one's statistics."""
        self._batchnorm.freeze(networks, batches_trained(trainer), step, measure=trainer.is_global_zero)
        if several_processes(trainer):
            copy_buffers_from_first_process(networks)

    def after_batch(self) -> None:
        """Report BatchNorm layers whose frozen statistics differ from those of the batch."""
        self.trains = True
        self._batchnorm.say()

    def why_no_range(self) -> str:
        """Why the fit that has ended observed no range, and what to do."""
        if self.trains:
            return (
                "No training step ran the network on finite values, so no range was observed and there is no int8 "
                "network. Call the network in training_step, through the LightningModule (self.net(x)), or name the "
                "one that is called with module=."
            )
        return (
            "The fit ran no training step, so no range was observed and there is no int8 network: the run of "
            "ckpt_path= had already ended. Increase max_epochs or max_steps of the Trainer; or, to begin from the "
            "weights of a float run, load them with load_from_checkpoint and fit without ckpt_path=."
        )

    def end(self) -> None:
        """Remove all hooks from optimizers and networks."""
        self._counter.end()
        self._batchnorm.end()

    def state_dict(self) -> dict[str, Any]:
        """Return the step counts and the snapshots of BatchNorm statistics."""
        return {"optimizer_steps": self._counter.state_dict(), "batchnorm": self._batchnorm.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; older checkpoints may not contain it."""
        self._counter.load_state_dict(state.get("optimizer_steps", []))
        self._batchnorm.load_state_dict(state.get("batchnorm", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Omit hooks, which belong to a running fit."""
        return self.__dict__ | {"_counter": StepCounter(), "_batchnorm": BatchNormFreeze()}


def curves(phase: Phase) -> dict[str, float]:
    """Return the flags of a phase as numbers for logging."""
    return {
        "quant/fake_quant_enabled": float(phase.fake_quant),
        "quant/observers_enabled": float(phase.observers),
        "quant/batchnorm_frozen": float(phase.batchnorm_frozen),
    }


_LEFT = {
    "start": "the int8 network would not be trained for its grid",
    "freeze_observers": "the ranges of activations would move until the end",
    "freeze_batchnorm": "BatchNorm's statistics would move until the end",
    "learn_scales": "no scale would learn",
}


def unreached(
    trainer: Trainer, schedule: QuantizationSchedule, plan: TrainingPlan, phase: Phase
) -> Iterator[tuple[str, bool]]:
    """Yield warnings about schedule points that training will not reach, or may not.

    Args:
        trainer: The Trainer at the beginning of training.
        schedule: The schedule points.
        plan: The planned length of training.
        phase: The phase reached before.

    Yields:
        The message, and whether it is about ``start``.
    """
    reached = {
        "start": phase.fake_quant,
        "freeze_observers": not phase.observers,
        "freeze_batchnorm": phase.batchnorm_frozen,
        "learn_scales": phase.scales_learn,
    }
    stoppers = _stoppers(trainer)
    for name, left in _LEFT.items():
        point: SchedulePoint | None = getattr(schedule, name)
        if point is None or reached[name] or point.at == 0:
            continue
        if _beyond(trainer, name, point, plan):
            # A fraction is reached at the next whole step, which may be the end of a short training.
            why = "no step begins" if point.unit == "fraction" else "training ends earlier"
            disable = "" if name == "start" else ", or use null (None) to disable it"
            message = (
                f"{name}={point} is never reached: {why} {'after it ' if point.unit == 'fraction' else ''}"
                f"({_length(trainer, plan)}), and {left}. Use an earlier point or train longer{disable}."
            )
        elif stoppers and not _ensured(trainer, point, plan):
            message = (
                f"{name}={point} may never be reached: {' and '.join(stoppers)} may end training earlier, and {left}. "
                "Trainer(min_epochs=) or (min_steps=) prevents that; or use an earlier point."
            )
        else:
            continue
        yield message, name == "start"


def frozen_too_early(schedule: QuantizationSchedule, plan: TrainingPlan) -> str:
    """Return a warning if ranges are frozen before fake-quantization is enabled; empty otherwise."""
    start, frozen = schedule.start, schedule.freeze_observers
    if start is None or frozen is None:
        return ""
    first, last = resolve(start, plan, name="start"), resolve(frozen, plan, name="freeze_observers")
    if first is None or last is None or last >= first:
        return ""
    return (
        f"freeze_observers={frozen} (step {last}) comes before start={start} (step {first}): the weights train on "
        "after the ranges of their activations are frozen, and are then rounded on ranges that no longer fit. Use a "
        "freeze_observers after start."
    )


def _beyond(trainer: Trainer, name: str, point: SchedulePoint, plan: TrainingPlan) -> bool:
    """Whether the planned training ends before a point."""
    manual = not trainer.lightning_module.automatic_optimization
    if point.unit == "fraction" and manual:
        batches = planned_batches(trainer)
        return batches is not None and exact(point.at) * batches > batches - 1
    if point.unit == "epoch" and plan.max_epochs is not None and point.at >= plan.max_epochs:
        return True
    at, total = resolve(point, plan, name=name), plan.total_steps
    # Under manual optimization the number of steps per batch is unknown.
    return at is not None and total is not None and at >= total and not (manual and point.unit == "step")


def _ensured(trainer: Trainer, point: SchedulePoint, plan: TrainingPlan) -> bool:
    """Whether training reaches a point even at its minimum length."""
    epochs, steps = trainer.min_epochs or 0, trainer.min_steps or 0
    if point.unit == "epoch":
        return point.at < epochs
    at = resolve(point, plan)
    return at is not None and at < max(steps, epochs * (plan.steps_per_epoch or 0))


def _stoppers(trainer: Trainer) -> list[str]:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    names = [type(callback).__name__ for callback in callbacks if isinstance(callback, EarlyStopping)]
    timed = any(isinstance(callback, Timer) and callback._duration is not None for callback in callbacks)
    return [*names, *(["max_time"] if timed else [])]


def _length(trainer: Trainer, plan: TrainingPlan) -> str:
    limits = [f"max_epochs={plan.max_epochs}"] if plan.max_epochs is not None else []
    limits += [f"max_steps={trainer.max_steps}"] if trainer.max_steps > 0 else []
    return ", ".join(limits + ([f"{plan.total_steps} steps"] if plan.total_steps is not None else []))
