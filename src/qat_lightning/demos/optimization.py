"""The optimizer of the demos' LightningModules: AdamW with a learning rate schedule."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule

from qat_lightning.errors import ConfigurationError

SCHEDULERS = ("cosine", "constant")


class AdamWModule(LightningModule):
    """Base class of the demos' LightningModules; subclasses define the loss.

    Args:
        lr: Peak learning rate.
        weight_decay: Weight decay of AdamW; not applied to biases and normalization layers.
        scheduler: `cosine` decays to zero over the steps of the planned training; `constant` does not.

    Raises:
        ConfigurationError: `scheduler` is unknown.
    """

    def __init__(
        self, lr: float = 2e-3, weight_decay: float = 1e-4, scheduler: Literal["cosine", "constant"] = "cosine"
    ) -> None:
        super().__init__()
        if scheduler not in SCHEDULERS:
            raise ConfigurationError(f"scheduler={scheduler!r} is not valid: use one of {', '.join(SCHEDULERS)}.")
        self.lr = lr
        self.weight_decay = weight_decay
        self.scheduler = scheduler

    def configure_optimizers(self) -> Any:
        """Return AdamW and its learning rate schedule."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr)
        if self.scheduler == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigurationError(
                "scheduler='cosine' needs to know when training ends: set trainer.max_epochs or trainer.max_steps, or "
                "set model.module.scheduler=constant."
            )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
