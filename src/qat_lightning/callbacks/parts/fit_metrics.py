"""What a fit logged, kept with its checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FitMetrics(Callback):
    """Keeps what a fit logged last, in the checkpoints too.

    A fit that is resumed from its very end has nothing left to train or to validate, and logs nothing: what it had
    logged comes from the checkpoint then.

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
        """Keep what is logged by now."""
        self._keep(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what is logged by now."""
        self._keep(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what is logged by now."""
        self._keep(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the values."""
        return {"metrics": dict(self.metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the values of the resumed fit."""
        self.metrics = dict(state_dict["metrics"])
