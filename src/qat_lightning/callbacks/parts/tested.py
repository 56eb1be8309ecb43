"""What a test by ``trainer.test`` alone found, behind the name of the network that it ran."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn


def log_tested(trainer: Trainer, variant: str) -> None:
    """Log the metrics of a test once more, as ``int8/test/acc``, which is how `evaluate_variants` logs them.

    So runs of a program that calls ``trainer.test`` and nothing of ours can be compared, and a logger says of which
    network the bare ``test/acc`` is. What a logger does not take costs a warning, and not the test.

    Args:
        trainer: At the end of a test.
        variant: What was tested.
    """
    if not trainer.is_global_zero or trainer.sanity_checking:
        return
    metrics = {f"{variant}/{key}": float(value) for key, value in trainer.logged_metrics.items()}
    metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
    if not metrics:
        return
    for logger in trainer.loggers:
        try:
            logger.log_metrics(metrics, step=trainer.global_step)
            logger.save()
        except Exception as error:  # noqa: BLE001 - a logger may be anybody's
            rank_zero_warn(
                f"{type(logger).__name__} did not accept {', '.join(metrics)} ({type(error).__name__}: {error})."
            )
