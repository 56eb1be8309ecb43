"""What a trial leaves behind: its result, and a float run for the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig

from qat_lightning.callbacks.median_pruning import MedianPruning
from qat_lightning.run import app
from qat_lightning.sweep import baseline
from qat_lightning.sweep.result import TrialResult
from qat_lightning.sweep.trial import Trial
from tests.configs.conftest import composed  # noqa: F401


def test_figures_that_are_not_finite_cost_no_result(tmp_path: Path) -> None:
    metrics = {"int8/sqnr_db": math.inf, "int8/test/loss": math.nan, "int8/test/perplexity": math.inf}
    TrialResult("completed", ["seed=1"], metrics, objective=[0.5, math.nan, math.inf]).write(tmp_path)
    found = TrialResult.read(tmp_path)
    assert found is not None
    assert found.metrics == {"int8/sqnr_db": 300.0, "int8/test/loss": None, "int8/test/perplexity": None}
    assert found.objective is not None
    assert [value if math.isfinite(value) else None for value in found.objective] == [0.5, None, None]


@pytest.mark.parametrize("reason", ["", "worse than the median"])
def test_a_float_run_that_was_pruned_is_not_shared(
    composed: Callable[..., DictConfig],  # noqa: F811
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruning = MedianPruning(tmp_path, monitor="val/loss")
    pruning.pruned = reason
    published: list[Any] = []
    monkeypatch.setattr(app, "fit", lambda cfg, run: None)
    monkeypatch.setattr(baseline.Baseline, "publish", lambda self, run: published.append(run))
    run = SimpleNamespace(callbacks=[pruning])
    words = ("baseline=shared", "method=float", "trainer=cpu", "debug=fast", f"baseline.folder={tmp_path}")
    baseline._fit_float(composed(*words), run)  # type: ignore[arg-type]
    assert len(published) == (not reason)


def test_a_checkpoint_of_other_settings_is_not_resumed_from(
    composed: Callable[..., DictConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Also not by the second launch of the new settings, if the first one ended before its first checkpoint."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()

    def begun(overrides: list[str], *, resume: bool, **changed: Any) -> Any:
        cfg = composed("debug=fast", "trainer=cpu")
        cfg.update(changed)
        return Trial(tmp_path, overrides, of_sweep=False, resume=resume).begun(cfg).ckpt_path

    assert begun(["seed=1"], resume=True) is None
    last.write_text("of seed 1")
    assert begun(["seed=1"], resume=True) == str(last)
    assert begun(["seed=1"], resume=True, ckpt_path=str(last)) == str(last)
    assert begun(["seed=2"], resume=False, ckpt_path=str(last)) == str(last), "asked for"
    assert last.is_file()
    assert begun(["seed=3"], resume=True) is None
    assert begun(["seed=3"], resume=True) is None, "it was stopped before it wrote one"
    assert (last.parent / "earlier.ckpt").read_text() == "of seed 1"
    last.write_text("of seed 3")
    assert begun(["seed=3"], resume=True) == str(last)
    assert begun(["seed=3"], resume=False) is None, "it was to start again"
    assert begun(["seed=3"], resume=True) is None


@pytest.mark.parametrize(
    "words", [["baseline.use=compare"], ["save_int8=false"], ["model.fused=true"], ["export=onnx"]]
)
def test_what_cannot_change_a_float_run_leaves_its_shared_run(
    composed: Callable[..., DictConfig],  # noqa: F811
    words: list[str],
) -> None:
    given = ("trainer=cpu", "debug=fast", "method=qat")
    assert baseline.Baseline.of(composed(*given, *words)).folder == baseline.Baseline.of(composed(*given)).folder
    other = composed(*given, "model.module.net.width=9")
    assert baseline.Baseline.of(other).folder != baseline.Baseline.of(composed(*given)).folder
