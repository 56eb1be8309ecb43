"""Logging of coverage: which layers are int8 and why others are not, and the int8 share of multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from qat_lightning.modes.coverage import int8_share
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.settings.recipe import Recipe


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Return the loggers that accept tables; empty except in the process that logs."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)] if trainer.is_global_zero else []


def warn_of_float(layers: Sequence[LayerCoverage], verb: str) -> None:
    """Warn of layers that are not int8, with the reasons.

    Args:
        layers: Coverage rows of layers, with names relative to the LightningModule.
        verb: ``"stayed float"`` or ``"will stay float"``.
    """
    left = [row for row in layers if not row.quantized]
    if left:
        rows = "; ".join(f"{row.name or 'the network'} ({row.kind}): {row.reason}" for row in left[:8])
        more = f"; and {len(left) - 8} more" if len(left) > 8 else ""
        rank_zero_warn(f"{len(left)} of {len(layers)} layers {verb}: {rows}{more}.")


def warn_of_detours(recipes: Iterable[Recipe]) -> None:
    """Warn once for all networks if this CPU computes int8 in another way than the backend."""
    for said in sorted({recipe.detour for recipe in recipes} - {""}):
        rank_zero_warn(said)


def log_coverage(trainer: Trainer, key: str, rows: Sequence[LayerCoverage]) -> None:
    """Log coverage to W&B: a table under ``key``, and the int8 share of multiply-accumulates as ``key_int8_macs``.

    Args:
        trainer: The Trainer whose loggers are used.
        key: For example ``"quant/coverage"``.
        rows: Coverage rows of layers and ops.
    """
    for logger in wandb_loggers(trainer):
        import wandb

        columns: list[str | int] = [field.name for field in fields(LayerCoverage)]
        data = [list(astuple(row)) for row in rows]
        logged: dict[str, object] = {key: wandb.Table(columns=columns, data=data, allow_mixed_types=True)}
        share = int8_share(rows)
        if share is not None:
            logged[f"{key}_int8_macs"] = share
        logger.log_metrics(logged, trainer.global_step)  # type: ignore[arg-type]


def report_prepared(trainer: Trainer, rows: Sequence[LayerCoverage], recipes: Iterable[Recipe]) -> None:
    """Report coverage before training, in the process that logs; layers excluded on purpose cause no warning.

    Args:
        trainer: The Trainer whose loggers are used.
        rows: Coverage rows of layers and ops.
        recipes: The recipes of the networks: kernels that this CPU does not have cause a warning.
    """
    warn_of_detours(recipes)
    log_coverage(trainer, "quant/coverage_prepared", rows)
    warn_of_float([row for row in rows if row.what == "layer" and not row.excluded], "will stay float")
