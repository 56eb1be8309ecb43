"""Best scores when fake-quantization is enabled: earlier ones belong to the float network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn


class BestCheckpoints:
    """Handles best scores of the float network when fake-quantization is enabled.

    Args:
        reset: Whether to reset them; otherwise a checkpoint of the float network that stays the best is reported.
    """

    def __init__(self, *, reset: bool) -> None:
        self.reset = reset
        self._of_float: list[str] = []

    def begin(self, trainer: Trainer) -> None:
        """Reset or record the best scores so far; fake-quantization is enabled now."""
        if self.reset:
            forget_best(trainer)
        self._of_float = _best_paths(trainer)

    def report(self, trainer: Trainer, start: object) -> None:
        """Warn at the end of the fit if the best checkpoint is one of the float network."""
        for path in sorted({*self._of_float} & {*_best_paths(trainer)}):
            rank_zero_warn(
                f"The best checkpoint, {path}, is from before fake-quantization was enabled (start={start}): its "
                "weights were not trained for quantization, and ckpt_path='best' loads them. Give "
                "reset_best_on_start=True to choose the best checkpoint from those after it."
            )

    def state_dict(self) -> dict[str, list[str]]:
        """Return the checkpoints that were the best then, if there were any."""
        return {"best_of_float": self._of_float} if self._of_float else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._of_float = list(state.get("best_of_float", []))


def _best_paths(trainer: Trainer) -> list[str]:
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    return [callback.best_model_path for callback in callbacks if callback.best_model_path]


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
