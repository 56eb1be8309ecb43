"""A real sweep of train.py, read, compared and drawn; in one file, so that it runs once."""

from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from qat_lightning import load_quantized
from qat_lightning.compare import Limits, Run, compare, decide, find_runs, page
from qat_lightning.demos import SmallMobileNet

pytestmark = pytest.mark.slow  # the sweep takes half a minute


@pytest.fixture(scope="module")
def runs(sweep: Path) -> list[Run]:
    """The runs of the sweep, read once: W&B's reader is a separate process per run."""
    return find_runs([sweep])


def test_a_sweep_of_train_py_is_read_with_all_that_its_runs_kept(runs: list[Run]) -> None:
    plain, qat = runs
    assert [plain.status, qat.status] == ["finished", "finished"]
    assert qat.overrides[:3] == ("method=qat", "seed=3", "mode=eager")
    assert qat.config["quantization"]["mode"] == "eager"
    assert {"int8/test/acc", "int8/latency_ms", "int8/size_mb", "speedup", "float/test/acc"} <= qat.metrics.keys()
    assert {"train/loss", "quant/fake_quant_enabled", "quant/batchnorm_frozen"} <= qat.curves.keys()
    assert load_quantized(qat.model_file, network=SmallMobileNet(in_channels=1, width=4)) is not None
    assert plain.model_file == ""
    assert qat.layers
    assert {"layer", "weight_sqnr_db"} <= qat.layers[0].keys()
    assert "float/test/acc" in plain.metrics
    assert "int8/test/acc" not in plain.metrics


def test_a_sweep_is_compared_with_its_float_run(runs: list[Run]) -> None:
    comparison = compare(runs)
    assert {c.label for c in comparison.configurations} == {"float", "qat"}
    (qat,) = (c for c in comparison.configurations if c.label == "qat")
    assert qat.baseline == "float runs"
    (float_run,) = (c for c in comparison.configurations if c.label == "float")
    assert qat.drop is not None
    assert qat.drop.mean == pytest.approx(100 * (float_run.score.mean - qat.score.mean))


def test_a_run_is_not_read_twice(sweep: Path) -> None:
    assert len(find_runs([sweep / "1", *(sweep / "1" / "wandb").glob("offline-run-*")])) == 1


def test_its_page_shows_its_runs(browser: webdriver.Chrome, runs: list[Run], tmp_path: Path) -> None:
    comparison = compare(runs)
    (tmp_path / "page.html").write_text(page(comparison, decide(comparison, Limits(max_size=10))), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    assert {cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#table .name")} == {"float", "qat"}
    assert browser.find_elements(By.CSS_SELECTOR, "#curves path")
    assert browser.find_elements(By.CSS_SELECTOR, "#layers .layer")
    assert browser.get_log("browser") == []
