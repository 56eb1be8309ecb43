"""``last.ckpt`` as the state that a fit was in last."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps one file, ``last.ckpt``, which is written again after each epoch and at the end.

    The ``save_last=True`` of a ``ModelCheckpoint`` with a ``monitor`` writes ``last.ckpt`` only when it writes a best
    checkpoint: where nothing improved any more, it is the last improvement, and a resumed run trains again what it had
    trained. It stands beside such a callback, which then leaves ``save_last`` alone.

    Args:
        dirpath: The folder.
        every_n_train_steps: Write it after so many optimizer steps and at the end; by default after each epoch.
        **options: Any other of ``ModelCheckpoint``, such as ``save_on_train_epoch_end``.

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
        """Not that of a `ModelCheckpoint` without ``monitor``, beside which it may stand."""
        return f"{type(self).__name__}{{'dirpath': {str(self.dirpath)!r}}}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it where the fit went on after it was written last."""
        if trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
