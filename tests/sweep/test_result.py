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
