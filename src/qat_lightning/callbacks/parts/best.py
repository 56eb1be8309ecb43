"""Resetting best scores when fake-quantization is enabled: earlier scores belong to the float network."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


def forget_best(trainer: Trainer) -> None:
    """Reset the Trainer's ``ModelCheckpoint`` and ``EarlyStopping``."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _forget_best(callback)


def _forget_best(callback: Callback) -> None:
    if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
        callback.best_k_models = {}
        callback.best_model_path = ""
        callback.best_model_score = None
        callback.kth_best_model_path = ""
        callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        callback.current_score = None
    elif isinstance(callback, EarlyStopping):
        callback.wait_count = 0
        worst = torch.tensor(torch.inf)
        callback.best_score = worst if callback.monitor_op == torch.lt else -worst
