"""The duration of recipes and epochs, measured on a small piece of each with this network on this machine."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qat_lightning.graph.example import Example
from qat_lightning.graph.signature import batch_size
from qat_lightning.ladder.costs import Part
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.workshop import Workshop
from qat_lightning.recipes.adaround import AdaRound, adaround
from qat_lightning.recipes.sequential_mse import clipping, sequential_mse

STEPS = 8
"""Measured iterations of AdaRound, for each layer or block."""

BATCHES = 4
"""Measured batches of a training and of its validation; the first one of the training is not counted."""


def minutes_of(part: Part, plan: Plan, workshop: Workshop) -> float:
    """The duration of a part of a plan.

    Args:
        part: The part.
        plan: The plan.
        workshop: Has the network and the data.

    Returns:
        Minutes; for a training those of one epoch, or 0 if the loader has no length.

    Raises:
        QuantizationError: The part cannot be run, with the reason.
    """
    if part == "epoch":
        return _epoch(plan, workshop) / 60
    if part == "sequential_mse":
        return _sequential_mse(plan, workshop) / 60
    return _adaround(plan, workshop) / 60


@dataclass(frozen=True)
class _Sample:
    """A prepared network, some calls of it, and how many times more a calibration has."""

    prepared: nn.Module
    calls: list[Example]
    more: float


def _sample(plan: Plan, workshop: Workshop, samples: int) -> _Sample:
    """A prepared network with the needed number of samples, or as many as a few batches have."""
    trainer, callback = workshop.calibrated(plan.without_recipes(), [])
    prepared = callback.prepared
    calls = workshop.calls(BATCHES)
    device = next((parameter.device for parameter in prepared.parameters()), torch.device("cpu"))
    enough = calls[: max(1, math.ceil(samples / (batch_size(calls[0]) or 1)))]
    batches = min(workshop.making.calibration_batches, _lengths(trainer)[0])
    return _Sample(prepared, [_on(device, call) for call in enough], batches / len(enough))


def _on(device: torch.device, call: Example) -> Example:
    return Example(
        *tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (call.args, call.kwargs))
    )


def _sequential_mse(plan: Plan, workshop: Workshop) -> float:
    sample = _sample(replace(plan, scheme=clipping(plan.scheme)), workshop, 1)
    return sample.more * _seconds(lambda: sequential_mse(sample.prepared, sample.calls))


def _adaround(plan: Plan, workshop: Workshop) -> float:
    """The passes over all batches, and the iterations, whose number does not depend on the batches."""
    blocks: Literal["none", "auto"] = "auto" if plan.adaround_blocks else "none"
    sample = _sample(plan, workshop, AdaRound().batch_size)
    _warm_up()

    def learning(steps: int) -> float:
        prepared = copy.deepcopy(sample.prepared)
        return _seconds(lambda: adaround(prepared, sample.calls, AdaRound(steps, blocks=blocks)))

    once = learning(1)
    step = max(0.0, learning(1 + STEPS) - once) / STEPS
    return sample.more * max(0.0, once - step) + plan.adaround * step


def _warm_up() -> None:
    """Import what the first optimizer of a process imports, which takes seconds."""
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()


def _seconds(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _epoch(plan: Plan, workshop: Workshop) -> float:
    """Train and validate on a few batches, and scale to whole loaders."""
    watch = _Stopwatch()
    few = {"limit_train_batches": BATCHES, "limit_val_batches": BATCHES, "num_sanity_val_steps": 0}
    whole = {"max_epochs": 1, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    trainer, _ = workshop.trained(plan, [], [watch], enable_progress_bar=False, **few, **whole)
    train, val = _lengths(trainer)
    usual = workshop.trainer([], [])
    steps, validated = _limited(train, usual.limit_train_batches), _limited(val, usual.limit_val_batches)
    if math.isinf(steps):
        return 0.0
    return steps * _pace(watch.trained) + (0.0 if math.isinf(validated) else validated * _pace(watch.validated))


def _lengths(trainer: Trainer) -> tuple[float, float]:
    """The numbers of training and validation batches; infinite for a loader without a length."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    datamodule.setup("fit")
    train, val = datamodule.train_dataloader(), datamodule.val_dataloader()
    return batches_of(train, "max_size_cycle"), batches_of(val, "sequential")


def batches_of(loaders: Any, mode: Literal["max_size_cycle", "sequential"]) -> float:
    """The number of batches of one iteration over a loader, or over a collection of them as Lightning combines it.

    Args:
        loaders: One loader, a collection of them, or a CombinedLoader, which keeps its mode.
        mode: Lightning's default: ``"max_size_cycle"`` in training, ``"sequential"`` in evaluation.

    Returns:
        The number; infinite if it depends on a loader without a length.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loaders = {"a": DataLoader(range(4)), "b": DataLoader(range(3))}
        >>> batches_of(loaders, "max_size_cycle"), batches_of(CombinedLoader(loaders, "min_size"), "sequential")
        (4, 3)
    """
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, mode)
    lengths = [_length(loader) for loader in combined.flattened if loader is not None]
    over: dict[str, Callable[[list[float]], float]] = {"min_size": min, "sequential": sum}
    return over.get(combined._mode, max)(lengths) if lengths else 0


def _length(loader: Any) -> float:
    try:
        return len(loader)
    except TypeError:
        return math.inf


def _limited(batches: float, limit: float) -> float:
    return min(batches, limit) if isinstance(limit, int) else batches * limit


def _pace(moments: list[float]) -> float:
    """Seconds per batch; the first is counted only if it is the only one."""
    counted = moments[1:] if len(moments) > 2 else moments
    return (counted[-1] - counted[0]) / (len(counted) - 1) if counted else 0.0


class _Stopwatch(Callback):
    """Records when the first batch started and when each ended."""

    def __init__(self) -> None:
        self.trained: list[float] = []
        self.validated: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.trained = self.trained or [time.monotonic()]

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained.append(time.monotonic())

    def on_validation_batch_start(self, *_: Any) -> None:
        self.validated = self.validated or [time.monotonic()]

    def on_validation_batch_end(self, *_: Any) -> None:
        self.validated.append(time.monotonic())
