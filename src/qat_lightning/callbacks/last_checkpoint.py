"""A ``last.ckpt`` that always holds the latest state of a fit."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps one file, ``last.ckpt``, which is written again after each epoch and at the end.

    The ``save_last=True`` of a ``ModelCheckpoint`` with a ``monitor`` writes ``last.ckpt`` only together with a best
    checkpoint: without further improvement it stays that of the last improvement, and a resumed run repeats training.
    Use this callback in addition, and leave ``save_last`` off.

    Args:
        dirpath: The folder.
        every_n_train_steps: Number of optimizer steps between writes; by default it is written after each epoch. Also
        at the end.
        **options: Other arguments of ``ModelCheckpoint``, such as ``save_on_train_epoch_end``.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> best = ModelCheckpoint("checkpoints", monitor="val/acc", mode="max")
        >>> callbacks = [best, LastCheckpoint("checkpoints")]
    """

    def __init__(self, dirpath: Any = None, *, every_n_train_steps: int | None = None, **options: Any) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=self.CHECKPOINT_NAME_LAST,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
            auto_insert_metric_name=False,
            **options,
        )

    @property
    def state_key(self) -> str:
        """Differs from that of a `ModelCheckpoint` without ``monitor``, with which it may be combined."""
        return f"{type(self).__name__}{{'dirpath': {str(self.dirpath)!r}}}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it if the fit continued after the last write."""
        if trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
