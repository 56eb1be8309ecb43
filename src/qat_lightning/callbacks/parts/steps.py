"""How many optimizer steps a fit has behind it, and how many it is planned to have.

Under automatic optimization Lightning counts both. Under manual optimization it counts the steps of all optimizers
together, and cannot know how many there will be: steps are counted here, for each optimizer, as it really takes them,
and a share of the training is one of its batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from qat_lightning.modes.sharded import reshard
from qat_lightning.settings.schedule import TrainingPlan


class StepCounter:
    """Counts the steps of each optimizer while a fit runs."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._handles: list[RemovableHandle] = []

    def forget(self) -> None:
        """Begin a new training."""
        self.end()
        self._counts = []

    def begin(self, trainer: Trainer) -> None:
        """Count from the state in a checkpoint, or from zero."""
        self.end()
        optimizers = trainer.optimizers
        if len(self._counts) != len(optimizers):
            # A checkpoint of before steps were counted: each had its equal share.
            self._counts = [trainer.global_step // max(1, len(optimizers))] * len(optimizers)
        for index, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_post_hook(self._counting(index)))

    def _counting(self, index: int) -> Any:
        def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._counts[index] += 1

        return count

    def steps(self, trainer: Trainer, networks: Iterable[nn.Module]) -> int:
        """The steps behind the networks: under manual optimization those of their optimizer that took the most.

        Args:
            trainer: While it fits.
            networks: The prepared ones; optimizers that hold none of their parameters do not count, unless all do not.
        """
        if trainer.lightning_module.automatic_optimization:
            return trainer.global_step
        reshard(trainer.lightning_module)  # else parameters are not those of the optimizer, after a validation
        theirs = {id(parameter) for network in networks for parameter in network.parameters()}
        holds = [
            any(id(parameter) in theirs for group in optimizer.param_groups for parameter in group["params"])
            for optimizer in trainer.optimizers
        ]
        counted = [count for count, held in zip(self._counts, holds, strict=True) if held or not any(holds)]
        return max(counted, default=0)

    def end(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> list[int]:
        """The counts, in the order of the optimizers."""
        return list(self._counts)

    def load_state_dict(self, counts: Iterable[int]) -> None:
        """Undo `state_dict`."""
        self._counts = list(counts)


def batches_trained(trainer: Trainer) -> int:
    """The batches that a fit has behind it, over all epochs and resumes."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.processed)


def has_trained(trainer: Trainer) -> bool:
    """Whether a fit trained anything; an optimizer that Lightning does not wrap takes steps that it does not count."""
    return bool(trainer.global_step or batches_trained(trainer))


def share_done(trainer: Trainer) -> Fraction | None:
    """The share of the planned training that is done, where it cannot be told in steps: under manual optimization.

    Returns:
        The largest of the shares of the limits that there are; None where there is none, or steps tell it.
    """
    if trainer.lightning_module.automatic_optimization:
        return None
    shares = []
    if trainer.max_steps > 0:
        shares.append(Fraction(trainer.global_step, trainer.max_steps))
    batches = planned_batches(trainer)
    if batches:
        shares.append(Fraction(batches_trained(trainer), batches))
    return max(shares, default=None)


def training_done(trainer: Trainer, plan: TrainingPlan) -> float | None:
    """The share of the planned training that is done, in steps or, under manual optimization, as `share_done` has it.

    Args:
        trainer: While it fits.
        plan: Of `training_plan`.

    Returns:
        None where the plan has no end.
    """
    if not trainer.lightning_module.automatic_optimization:
        share = share_done(trainer)
        return None if share is None else float(share)
    return None if plan.total_steps is None else trainer.global_step / max(1, plan.total_steps)


def planned_batches(trainer: Trainer) -> int | None:
    """All batches up to ``max_epochs``; None if that cannot be told."""
    epochs, batches = _max_epochs(trainer), trainer.num_training_batches
    return None if epochs is None or not math.isfinite(batches) else epochs * int(batches)


def training_plan(trainer: Trainer) -> TrainingPlan:
    """How long the training is meant to be; an epoch of manual optimization has a step for each batch, or fewer."""
    manual = not trainer.lightning_module.automatic_optimization
    max_steps, max_epochs, batches = trainer.max_steps, _max_epochs(trainer), trainer.num_training_batches
    if manual and max_steps > 0:
        max_steps = max_steps // max(1, len(trainer.optimizers))
    if not math.isfinite(batches):
        return TrainingPlan(None, max_steps, max_epochs)
    accumulation = _accumulation(trainer)
    if accumulation is None or max_epochs is None:
        return TrainingPlan(math.ceil(batches / trainer.accumulate_grad_batches), max_steps, max_epochs)
    # Epochs of several lengths: their sum, as a limit on steps.
    total = sum(math.ceil(batches / accumulation.get_accumulate_grad_batches(epoch)) for epoch in range(max_epochs))
    return TrainingPlan(None, total if max_steps < 0 else min(total, max_steps), max_epochs)


def _accumulation(trainer: Trainer) -> GradientAccumulationScheduler | None:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)


def _max_epochs(trainer: Trainer) -> int | None:
    """Without the epoch that stochastic weight averaging adds to estimate BatchNorm, which trains nothing."""
    epochs = trainer.max_epochs
    if epochs is None or epochs < 0:
        return None
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [c for c in callbacks if isinstance(c, StochasticWeightAveraging)]
    return epochs - sum(bool(callback._model_contains_batch_norm) for callback in averaging)


def estimates_batchnorm(trainer: Trainer) -> bool:
    """Whether the running epoch is the one that stochastic weight averaging adds."""
    return bool(trainer.fit_loop._skip_backward)
