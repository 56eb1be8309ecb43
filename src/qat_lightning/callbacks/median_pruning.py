"""Ending trials of a sweep that are worse than the median at the same point."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qat_lightning.callbacks.parts.arguments import check_count, check_flag, check_word
from qat_lightning.errors import ConfigurationError
from qat_lightning.json_files import read_json, write_json

_FILE = "curve.json"


def why_pruned(callbacks: Iterable[Callback]) -> str:
    """Why one of the callbacks ended a fit early, as `MedianPruning` does; empty if none did."""
    return next((reason for callback in callbacks if (reason := getattr(callback, "pruned", ""))), "")


class MedianPruning(Callback):
    """Ends the fit of a trial that is worse than the median of its siblings at the same epoch (Golovin et al., 2017).

    After each validation the best value of ``monitor`` so far is written to a file in the trial's folder. From
    ``warmup_epochs`` on it is compared with the median of the values that at least ``min_trials`` other trials of the
    sweep had reached at that epoch, whether they have ended or are still running, in any process or on any machine:
    they are found by their files. The fit of a worse trial ends; the network is converted and measured, and the trial
    counts as pruned. A sweeper gets its figures like any other's.

    With `QuantizationAwareTraining` trials with different schedules are not comparable before
    fake-quantization is enabled: choose ``warmup_epochs`` after ``start``. A trial outside a sweep's folder is never
    ended.

    Args:
        folder: The trial's own folder; its siblings are the numbered folders beside it.
        monitor: A metric that is logged in validation.
        mode: ``"max"`` if larger is better, or ``"min"``.
        warmup_epochs: Epochs before the first comparison.
        min_trials: Number of other trials that must have reached the epoch.
        enabled: False disables it.

    Attributes:
        pruned: Why the fit was ended; empty if it was not.

    Raises:
        ConfigurationError: A setting is invalid; at construction.

    Example:
        >>> MedianPruning("multirun/mine/3", warmup_epochs=2).pruned
        ''
    """

    def __init__(
        self,
        folder: str | Path,
        monitor: str = "val/acc",
        mode: str = "max",
        warmup_epochs: int = 1,
        min_trials: int = 3,
        enabled: bool = True,
    ) -> None:
        check_word("folder", str(folder))
        check_word("monitor", monitor)
        check_flag("enabled", enabled)
        if mode not in ("min", "max"):
            raise ConfigurationError(f"mode={mode!r} is not valid: use max or min.")
        for name, value in (("warmup_epochs", warmup_epochs), ("min_trials", min_trials)):
            check_count(name, value)
        self.folder = Path(folder)
        self.monitor = monitor
        self.mode = mode
        self.warmup_epochs = warmup_epochs
        self.min_trials = min_trials
        self.enabled = enabled
        self.pruned = ""
        self._curve: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the trial's progress, and end its fit if it is worse than the median."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self.enabled:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ConfigurationError(f"monitor={self.monitor!r} was not logged in validation; {known} was.")
        best = max if self.mode == "max" else min
        seen = [float(trainer.callback_metrics[self.monitor]), *self._curve.values()]
        value = best(filter(math.isfinite, seen), default=None)
        epoch = trainer.current_epoch + 1
        if value is not None:
            self._curve[str(epoch)] = value
        if trainer.is_global_zero:
            write_json(self.folder / _FILE, self._curve)
        reason = self._reason_to_end(value, epoch)
        # All processes end together, whichever reads the files first.
        if trainer.strategy.reduce_boolean_decision(bool(reason), all=False):
            self.pruned = reason or "another process of this trial found it worse than the median"
            trainer.should_stop = True
            rank_zero_info(f"The fit ends here: {self.pruned}.")

    def _reason_to_end(self, value: float | None, epoch: int) -> str:
        others = self._others(str(epoch))
        if epoch < self.warmup_epochs or len(others) < self.min_trials:
            return ""
        if value is None:
            return f"{self.monitor} had no finite value until epoch {epoch}"
        middle = median(others)
        if value >= middle if self.mode == "max" else value <= middle:
            return ""
        return (
            f"after epoch {epoch} the best {self.monitor} was {value:.4g}, and the median of {len(others)} others "
            f"{middle:.4g}"
        )

    def _others(self, epoch: str) -> list[float]:
        if not self.folder.name.isdecimal():
            return []
        beside = [path for path in self.folder.parent.glob(f"*/{_FILE}") if path.parent.name.isdecimal()]
        curves = [read_json(path) for path in beside if path.parent.name != self.folder.name]
        return [float(curve[epoch]) for curve in curves if epoch in curve]

    def state_dict(self) -> dict[str, Any]:
        """The values that this trial has reached."""
        return {"curve": json.dumps(self._curve)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._curve = json.loads(state_dict["curve"])
