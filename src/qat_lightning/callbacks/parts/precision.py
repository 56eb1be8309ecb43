"""The precision of a Trainer, for batches and steps outside its loops."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn


def float_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of a module's first floating-point parameter; None if there is none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def in_precision(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Convert a batch as the loops of the Trainer do, once the LightningModule is in the Trainer's precision.

    Lightning converts modules after ``setup``; before that, batches are not converted.
    """
    return trainer.precision_plugin.convert_input(batch) if _is_converted(trainer, pl_module) else batch


def precision_of_new_tensors(pl_module: LightningModule) -> AbstractContextManager[Any]:
    """Return the context of a step with ``precision="bf16-true"`` and others that change the dtype of new tensors.

    Autocast is not entered: with float32 weights, ranges are observed in float32.
    """
    trainer = pl_module._trainer
    if trainer is None or isinstance(trainer.precision_plugin, MixedPrecision):
        return nullcontext()
    return trainer.precision_plugin.forward_context() if _is_converted(trainer, pl_module) else nullcontext()


def _is_converted(trainer: Trainer, pl_module: LightningModule) -> bool:
    converted: Tensor = trainer.precision_plugin.convert_input(torch.zeros((), dtype=torch.float32))
    return float_dtype(pl_module) == converted.dtype
