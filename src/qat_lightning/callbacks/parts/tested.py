"""Logging the metrics of ``trainer.test`` under the name of the variant that was tested."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from qat_lightning.numerics.sqnr import finite


def log_tested(trainer: Trainer, variant: str) -> None:
    """Log the metrics of a test again, for example as ``int8/test/acc``, the name that `evaluate_variants` uses.

    Runs of programs that call only ``trainer.test`` can then be compared, and the logger shows which network
    ``test/acc`` belongs to. If a logger does not accept the metrics, a warning is given.

    Args:
        trainer: The Trainer at the end of a test.
        variant: The tested variant.
    """
    if not trainer.is_global_zero or trainer.sanity_checking:
        return
    metrics = finite({f"{variant}/{key}": float(value) for key, value in trainer.logged_metrics.items()})
    if not metrics:
        return
    for logger in trainer.loggers:
        try:
            logger.log_metrics(metrics, step=trainer.global_step)
            logger.save()
        except Exception as error:  # noqa: BLE001 - third-party loggers may raise anything
            rank_zero_warn(
                f"{type(logger).__name__} did not accept {', '.join(metrics)} ({type(error).__name__}: {error})."
            )
