"""Keeping the metrics of a fit with its checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FitMetrics(Callback):
    """Keeps the last logged metrics of a fit, also in checkpoints.

    A fit resumed from a checkpoint of its end trains and validates nothing, and so logs nothing. Its metrics then come
    from the checkpoint.

    Attributes:
        metrics: The values by name, such as ``val/acc``.

    Example:
        >>> callbacks = [FitMetrics()]
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def _keep(self, trainer: Trainer) -> None:
        if not trainer.sanity_checking:
            self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics logged so far."""
        self._keep(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics logged so far."""
        self._keep(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics logged so far."""
        self._keep(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics."""
        return {"metrics": dict(self.metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics of the resumed fit."""
        self.metrics = dict(state_dict["metrics"])
