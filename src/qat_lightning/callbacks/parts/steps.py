"""Counting optimizer steps of a fit, and planning how many there will be.

Under automatic optimization Lightning counts both. Under manual optimization it counts the steps of all optimizers
together and cannot know the total. Steps are then counted here per optimizer, and a fraction of the training is a
fraction of its batches.
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
    """Counts the steps of each optimizer during a fit."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._handles: list[RemovableHandle] = []

    def forget(self) -> None:
        """Reset the counts for a new training."""
        self.end()
        self._counts = []

    def begin(self, trainer: Trainer) -> None:
        """Start counting, from the counts of a restored checkpoint or from zero."""
        self.end()
        optimizers = trainer.optimizers
        if len(self._counts) != len(optimizers):
            # An older checkpoint without counts: divide the steps equally among optimizers.
            self._counts = [trainer.global_step // max(1, len(optimizers))] * len(optimizers)
        for index, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_post_hook(self._counting(index)))

    def _counting(self, index: int) -> Any:
        def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._counts[index] += 1

        return count

    def steps(self, trainer: Trainer, networks: Iterable[nn.Module]) -> int:
        """Return the number of steps done; under manual optimization, of the networks' optimizer with the most steps.

        Args:
            trainer: The Trainer, during a fit.
            networks: The prepared networks; optimizers without any of their parameters are ignored, unless all are.
        """
        if trainer.lightning_module.automatic_optimization:
            return trainer.global_step
        reshard(trainer.lightning_module)  # after validation, parameters are otherwise not those of the optimizer
        theirs = {id(parameter) for network in networks for parameter in network.parameters()}
        holds = [
            any(id(parameter) in theirs for group in optimizer.param_groups for parameter in group["params"])
            for optimizer in trainer.optimizers
        ]
        counted = [count for count, held in zip(self._counts, holds, strict=True) if held or not any(holds)]
        return max(counted, default=0)

    def end(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> list[int]:
        """Return the counts in the order of the optimizers."""
        return list(self._counts)

    def load_state_dict(self, counts: Iterable[int]) -> None:
        """Restore what `state_dict` returned."""
        self._counts = list(counts)


def batches_trained(trainer: Trainer) -> int:
    """Return the number of batches trained, over all epochs and resumes."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.processed)


def has_trained(trainer: Trainer) -> bool:
    """Whether a fit trained anything, including steps of optimizers that Lightning does not wrap or count."""
    return bool(trainer.global_step or batches_trained(trainer))


def share_done(trainer: Trainer) -> Fraction | None:
    """Return the finished fraction of the planned training under manual optimization.

    Returns:
        The largest finished fraction of the training's limits; None if there is no limit, or under automatic
        optimization, where steps tell it.
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
    """Return the finished fraction of the planned training, in steps or, under manual optimization, by `share_done`.

    Args:
        trainer: The Trainer, during a fit.
        plan: Result of `training_plan`.

    Returns:
        The fraction; None if the planned length is unknown.
    """
    if not trainer.lightning_module.automatic_optimization:
        share = share_done(trainer)
        return None if share is None else float(share)
    return None if plan.total_steps is None else trainer.global_step / max(1, plan.total_steps)


def planned_batches(trainer: Trainer) -> int | None:
    """Return the number of batches up to ``max_epochs``; None if it is unknown."""
    epochs, batches = _max_epochs(trainer), trainer.num_training_batches
    return None if epochs is None or not math.isfinite(batches) else epochs * int(batches)


def training_plan(trainer: Trainer) -> TrainingPlan:
    """Return the planned length; an epoch of manual optimization has at most one step per batch."""
    manual = not trainer.lightning_module.automatic_optimization
    max_steps, max_epochs, batches = trainer.max_steps, _max_epochs(trainer), trainer.num_training_batches
    if manual and max_steps > 0:
        max_steps = max_steps // max(1, len(trainer.optimizers))
    if not math.isfinite(batches):
        return TrainingPlan(None, max_steps, max_epochs)
    accumulation = _accumulation(trainer)
    if accumulation is None or max_epochs is None:
        return TrainingPlan(math.ceil(batches / trainer.accumulate_grad_batches), max_steps, max_epochs)
    # Epochs differ in length: use their sum as a limit on steps.
    total = sum(math.ceil(batches / accumulation.get_accumulate_grad_batches(epoch)) for epoch in range(max_epochs))
    return TrainingPlan(None, total if max_steps < 0 else min(total, max_steps), max_epochs)


def _accumulation(trainer: Trainer) -> GradientAccumulationScheduler | None:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)


def _max_epochs(trainer: Trainer) -> int | None:
    """Return ``max_epochs`` without the epoch that stochastic weight averaging adds to estimate BatchNorm."""
    epochs = trainer.max_epochs
    if epochs is None or epochs < 0:
        return None
    return epochs - len(_adding_an_epoch(trainer))


def _adding_an_epoch(trainer: Trainer) -> list[StochasticWeightAveraging]:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, StochasticWeightAveraging) and c._model_contains_batch_norm]


def estimates_batchnorm(trainer: Trainer) -> bool:
    """Whether the running epoch is the one that stochastic weight averaging adds, in which nothing is trained."""
    # `fit_loop._skip_backward` says the same, but only after that callback's own hook at the start of the epoch.
    epochs = _max_epochs(trainer)
    return epochs is not None and trainer.current_epoch >= epochs and bool(_adding_an_epoch(trainer))
