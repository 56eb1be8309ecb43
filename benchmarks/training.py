"""A quiet Trainer on the CPU, for benchmarks that train."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from lightning.pytorch import Callback, Trainer


def silent() -> None:
    """Disable Lightning's log messages and tips."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torch.ao")


def trainer(epochs: int, callbacks: list[Callback] | None = None, **settings: Any) -> Trainer:
    """Return a Trainer for a number of epochs, without logger, checkpoints and validation."""
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **settings,
    )
