"""What the benchmarks that train have in common: a Trainer on the CPU that says and writes nothing."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from lightning.pytorch import Callback, Trainer


def silent() -> None:
    """Lightning's log and advice off."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torch.ao")


def trainer(epochs: int, callbacks: list[Callback] | None = None, **settings: Any) -> Trainer:
    """A Trainer of so many epochs, without logger, checkpoints and validation."""
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
