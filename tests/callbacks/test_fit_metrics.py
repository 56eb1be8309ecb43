"""The last metrics of a fit are available after a resume."""

from __future__ import annotations

from pathlib import Path

from qat_lightning.callbacks.last_checkpoint import LastCheckpoint
from qat_lightning.callbacks.parts.fit_metrics import FitMetrics
from tests.callbacks.lit import Lit, loader, qat, trainer


class Validated(Lit):
    """Logs a validation metric that differs between epochs."""

    def validation_step(self, batch: object, index: int) -> None:
        self.log("val/step", float(self.global_step))


def test_a_fit_that_is_resumed_from_its_end_has_what_it_had_logged(tmp_path: Path) -> None:
    kept = FitMetrics()
    made = trainer(kept, qat(), LastCheckpoint(tmp_path), enable_checkpointing=True, max_epochs=2)
    made.fit(Validated(), loader(), loader())
    assert kept.metrics["val/step"] == float(made.global_step)
    resumed = FitMetrics()
    again = trainer(resumed, qat(), LastCheckpoint(tmp_path), enable_checkpointing=True, max_epochs=2)
    again.fit(Validated(), loader(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert "val/step" not in again.callback_metrics, "nothing was left to validate"
    assert resumed.metrics == kept.metrics
    longer = FitMetrics()
    more = trainer(longer, qat(), LastCheckpoint(tmp_path), enable_checkpointing=True, max_epochs=3)
    more.fit(Validated(), loader(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert longer.metrics["val/step"] == float(more.global_step) > kept.metrics["val/step"]
