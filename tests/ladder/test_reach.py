"""`reach` with a real Trainer, on a network that learns in a second."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger, WandbLogger

from qat_lightning import Scheme, Target, load_quantized, reach
from qat_lightning.errors import ConfigurationError
from qat_lightning.ladder.reached import Reached
from qat_lightning.settings.engines import onednn_is_exact
from tests.ladder.lit import CPU, Data, Lit, LitBlock, trained
from tests.sweep.running import offline_runs

COARSE = Scheme(weight_bits=2, weight_granularity="per_tensor")
QUICK: dict[str, Any] = {"short_epochs": 1, "long_epochs": 0, "adaround_iterations": 0, "calibration_batches": 4}


@pytest.fixture(scope="module")
def float_run() -> tuple[Lit, Data]:
    return trained()


def search(float_run: tuple[Lit, Data], target: Target, folder: Path, **settings: Any) -> Reached:
    return reach(CPU, *float_run, target, folder=folder, **{**QUICK, **settings})


def test_the_first_rung_that_keeps_the_target_ends_it(
    float_run: tuple[Lit, Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = float_run
    moved = data.moved
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = search(float_run, Target(max_drop=0.2, max_size_mb=1), tmp_path / "ladder")
    assert found.kept
    assert [attempt.rung for attempt in found.attempts] == ["static"]
    assert found.metric.name == "val/acc"
    assert {"float/test/acc", "int8/test/acc", "speedup", "int8/agreement"} <= found.metrics.keys()
    assert found.float_metrics.keys() == {"float/val/acc", "float/val/loss"}
    (file,) = found.files
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(load_quantized(file)(x), found.load()(x))
    shown = capsys.readouterr().out
    assert "static keeps the target" in shown
    assert "Target: a drop of at most 0.2, at most 1 MB" in shown
    ladder = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    assert [row["chosen"] for row in ladder["rows"]] == [True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "it stays as it is"
    assert (model.tests, data.moved) == (0, moved)


@pytest.mark.slow
def test_a_hard_target_is_climbed_for_and_what_is_nearest_is_kept(float_run: tuple[Lit, Data], tmp_path: Path) -> None:
    runs: list[str] = []

    def loggers(rung: str) -> list[Logger]:
        runs.append(rung)
        made = WandbLogger(name=rung, group="one-ladder", save_dir=tmp_path / rung, offline=True)
        (tmp_path / rung).mkdir()
        return [made]

    target = Target(max_drop=0.0)
    settings = {"scheme": COARSE, "loggers": loggers, "adaround_iterations": 10}
    found = search(float_run, target, tmp_path / "ladder", **settings)
    rungs = [attempt.rung for attempt in found.attempts]
    assert rungs[:2] == ["static", "bias_correction"], "most of the error comes from 2-bit weights"
    assert found.sources.larger == "weights"
    assert json.loads((tmp_path / "ladder" / "sources.json").read_text())["found"] == vars(found.sources)
    assert found.sources.words() in str(found.table().caption)
    assert found.sources.words() == json.loads((tmp_path / "ladder" / "ladder.json").read_text())["sources"]
    refused = [attempt for attempt in found.attempts if attempt.error]
    assert all(attempt.error.startswith("not validated: the SQNR of the outputs") for attempt in refused)
    made = [attempt for attempt in found.attempts if not attempt.error]
    assert runs == ["float", *(attempt.rung for attempt in made), "test"], "each is a run, and the test is the last"
    best = found.best
    assert best is not None
    if not found.kept:
        assert rungs[-1] == "qat_short"
        assert best.missed(target)["drop"] == min(attempt.missed(target)["drop"] for attempt in made)
        assert "is not reached" in found.conclusion()
    kept = {run["name"]: run for run in offline_runs(tmp_path)}
    assert kept.keys() == {*runs}
    for attempt in made:
        summary = kept[attempt.rung]["summary"]
        assert attempt.drop is not None
        assert summary["ladder/drop"] == pytest.approx(attempt.drop.mean)
        assert ("ladder/sqnr_weights_db" in summary) == (attempt.rung != "static")
        assert summary["int8/val/acc"] == pytest.approx(summary["float/val/acc"] - attempt.drop.mean, abs=1e-5), (
            "the drop of an accuracy is that of the whole validation"
        )
        assert not [key for key in summary if "test/" in key], "test data is looked at once"
    assert kept["test"]["summary"]["int8/test/acc"] == found.metrics["int8/test/acc"]

    again = search(float_run, target, tmp_path / "ladder", scheme=COARSE, adaround_iterations=10, resume=True)
    assert again.attempts == found.attempts, "nothing is measured twice"
    assert again.metrics == found.metrics
    assert again.sources == found.sources
    assert float_run[0].tests == 0


@pytest.mark.slow
def test_a_speed_that_pytorch_has_not_is_looked_for_in_files(float_run: tuple[Lit, Data], tmp_path: Path) -> None:
    target = Target(max_drop=1.0, min_speedup=1000)
    found = search(float_run, target, tmp_path, files=["torchscript", "executorch"])
    rungs = {attempt.rung: attempt for attempt in found.attempts}
    kernels = (["backend_onednn"], ["mode_pt2e"]) if onednn_is_exact() else (["backend_fbgemm"], [])
    assert list(rungs) == ["static", *kernels[0], "file_torchscript", *kernels[1]], "executorch takes no fx network"
    file = rungs["file_torchscript"]
    assert not file.error
    assert file.metrics["torchscript/size_mb"] == file.size_mb
    assert file.drop is not None
    assert "Nothing is left to try" in found.conclusion()
    if found.best is file:
        assert found.files[0].name == "model.torchscript.pt"
        assert "torchscript/test/acc" in found.metrics
        assert found.metrics["torchscript/speedup"] == file.speedup, "the file is timed once"

    written = tmp_path / "rungs" / "file_torchscript" / "export" / "model.torchscript.pt"
    moment = written.stat().st_mtime_ns
    (tmp_path / "rungs" / "file_torchscript" / "measured.json").unlink()  # as after a kill before it was written
    again = search(float_run, target, tmp_path, files=["torchscript", "executorch"], resume=True)
    (resumed,) = (attempt for attempt in again.attempts if attempt.rung == "file_torchscript")
    assert (resumed.speedup, resumed.size_mb, resumed.drop) == (file.speedup, file.size_mb, file.drop)
    assert written.stat().st_mtime_ns == moment


@pytest.mark.slow
def test_a_loss_is_judged_upwards_and_a_size_by_fewer_bits(float_run: tuple[Lit, Data], tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    least = search(float_run, Target(max_drop=9.0), tmp_path / "first", metric="val/loss", test=False)
    assert (least.metric.larger_is_better, least.metrics) == (False, {})
    (static,) = least.attempts
    assert static.drop is not None
    assert static.drop.mean == pytest.approx(
        static.metrics["int8/val/loss"] - least.float_metrics["float/val/loss"], abs=1e-5
    )
    assert static.size_mb is not None
    smaller = Target(max_size_mb=static.size_mb - 0.0002)
    found = search(float_run, smaller, tmp_path / "second", metric="val/loss", test=False)
    chosen = found.attempts[1]
    assert (found.attempts[0].rung, chosen.rung) == ("static", "bits_by_layer")
    assert {fields["weight_bits"] for fields in (chosen.plan.scheme.overrides or {}).values()} <= {2, 3, 4, 6, 8}
    assert chosen.size_mb < static.size_mb  # type: ignore[operator]
    assert json.loads((tmp_path / "second" / "bits.json").read_text())["found"] == chosen.plan.scheme.overrides


@pytest.mark.slow
def test_the_clock_ends_it_and_says_so(float_run: tuple[Lit, Data], tmp_path: Path) -> None:
    found = search(float_run, Target(max_drop=0.0, max_minutes=1e-6), tmp_path / "none", scheme=COARSE)
    assert found.attempts == ()
    assert "minutes are used up" in found.conclusion()
    slow, loss = Target(max_drop=0.0, max_minutes=0.5), {"metric": "val/loss", "test": False}
    found = search(float_run, slow, tmp_path / "few", scheme=COARSE, short_epochs=100_000, **loss)
    last = found.attempts[-1]
    assert last.rung == "qat_short" or "minutes" in found.why_ended
    assert sum(attempt.minutes for attempt in found.attempts) < 0.6
    if last.rung == "qat_short":
        assert not last.started
        assert last.error.startswith("not started: it takes about")


def test_what_cannot_be_is_refused_before_anything_runs(float_run: tuple[Lit, Data], tmp_path: Path) -> None:
    folder = tmp_path / "ladder"
    for target, settings, says in (
        (Target(max_size_mb=1e-5), {}, "cannot be reached: 972 parameters"),
        (Target(max_drop=0.1), {"short_epochs": -1}, "short_epochs=-1"),
        (Target(max_drop=0.1), {"files": ["nothing"]}, "files: ['nothing']"),
        (
            Target(max_drop=0.1),
            {"files": ["tflite"]},
            "files: ['tflite']",
        ),  # a format, but none that is tried for speed
        (Target(max_drop=0.1), {"mode": "pt2e", "backend": "qnnpack"}, "mode="),
        ({"max_drop": 0.1}, {}, "give a qat_lightning.Target"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            search(float_run, target, folder, **settings)  # type: ignore[arg-type]
        assert says in str(caught.value)
        assert not folder.exists()
    one_batch = float_run[0], Data(batch_size=200)
    with pytest.raises(ConfigurationError, match="several batches of validation data, and there is one"):
        search(one_batch, Target(max_drop=0.1, confident=True), tmp_path / "one")
    with pytest.raises(ConfigurationError, match="validation logs val/loss, val/acc"):
        search(float_run, Target(max_drop=0.1), folder, metric="val/f1")


def test_other_metrics_that_are_not_finite_cost_nothing(float_run: tuple[Lit, Data], tmp_path: Path) -> None:
    class Sparse(Lit):
        """Logs a metric that no value exists of, as that of a class without samples, and one that is infinite."""

        def on_validation_epoch_end(self) -> None:
            self.log("val/f1", float("nan"))
            self.log("val/perplexity", float("inf"))
            super().on_validation_epoch_end()

    model = Sparse()
    model.load_state_dict(float_run[0].state_dict())
    run, target = (model, float_run[1]), Target(max_drop=0.5)
    found = search(run, target, tmp_path / "found", metric="val/acc", test=False)
    assert found.kept
    assert found.float_metrics.keys() == {"float/val/acc", "float/val/loss"}
    with pytest.raises(ConfigurationError, match="is nan, so networks cannot be judged"):
        search(run, target, tmp_path / "refused", metric="val/f1")


def test_data_is_set_up_once_where_it_can_be_copied(float_run: tuple[Lit, Data], tmp_path: Path) -> None:
    class Kept(Data):
        def setup(self, stage: str) -> None:
            if not hasattr(self, "sets"):
                loaded.append(stage)
                super().setup(stage)

    class Open(Kept):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.lock = threading.Lock()  # nothing can copy it

    drops = []
    for of, times in ((Kept, 1), (Open, 4)):
        loaded: list[str] = []
        settings = {"folder": tmp_path / of.__name__, "test": False, **QUICK}
        found = reach(CPU, float_run[0], of(), Target(max_drop=0.5), **settings)
        assert len(loaded) == times, of
        drops.append(found.attempts[0].drop)
    assert drops[0] == drops[1], "and it makes no difference"


def test_a_rung_is_validated_once_where_the_parts_tell_the_whole(float_run: tuple[Lit, Data], tmp_path: Path) -> None:
    class Most(Lit):
        """Logs what is no mean over samples."""

        def on_validation_epoch_end(self) -> None:
            self.log("val/most", torch.cat(self.right).float().sum())
            super().on_validation_epoch_end()

    class Counted(Data):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            batches.append(1)
            return batch

    def searched(of: type[Lit]) -> tuple[Reached, int]:
        model = of()
        model.load_state_dict(float_run[0].state_dict())
        batches.clear()
        target, folder = Target(max_drop=0.5), tmp_path / of.__name__
        return reach(CPU, model, Counted(), target, folder=folder, test=False, **QUICK), len(batches)

    batches: list[int] = []
    plain, once = searched(Lit)
    other, twice = searched(Most)
    assert twice == once + 8, "the 8 batches of the whole validation of one rung"
    assert plain.attempts[0].drop == other.attempts[0].drop
    for name in ("val/acc", "val/loss"):
        key = f"int8/{name}"
        assert plain.attempts[0].metrics[key] == pytest.approx(other.attempts[0].metrics[key], abs=1e-5)
    assert other.attempts[0].metrics["int8/val/most"] > 16


def test_a_folder_is_of_one_ladder(float_run: tuple[Lit, Data], tmp_path: Path) -> None:
    target = Target(max_drop=0.5)
    search(float_run, target, tmp_path, test=False)
    with pytest.raises(ConfigurationError, match="resume=True continues it"):
        search(float_run, target, tmp_path, test=False)
    with pytest.raises(ConfigurationError, match=r"has other settings \(limits differ\)"):
        search(float_run, Target(max_drop=0.1), tmp_path, resume=True)
    with pytest.raises(ConfigurationError, match=r"\(weights differ\)"):
        reach(CPU, Lit(), Data(), target, folder=tmp_path, resume=True, **QUICK)


@pytest.mark.nightly
def test_weights_of_few_bits_are_learned_by_blocks_where_there_are_some(tmp_path: Path) -> None:
    settings = {"scheme": COARSE, "adaround_iterations": 4, "short_epochs": 0, "metric": "val/loss", "test": False}
    found = search(trained(of=LitBlock), Target(max_drop=0.0), tmp_path, **settings)
    rungs = {attempt.rung: attempt for attempt in found.attempts}
    assert all(not attempt.error or attempt.error.startswith("not validated") for attempt in found.attempts)
    assert list(rungs)[3:5] == ["sequential_mse", "adaround_blocks"][: len(rungs) - 3]
    assert "adaround" not in rungs or list(rungs)[5] == "adaround", "by layers, unless blocks helped"
    for name in list(rungs)[3:5]:
        drop = rungs[name].drop
        assert drop is not None
        assert math.isfinite(drop.mean)
    assert len(rungs) > 3


@pytest.mark.slow
def test_a_search_of_an_earlier_version_goes_on_with_its_own_rungs(float_run: tuple[Lit, Data], tmp_path: Path) -> None:
    settings = {"scheme": COARSE, "short_epochs": 0, "metric": "val/loss", "test": False}
    target = Target(max_drop=0.0)
    search(float_run, Target(max_drop=0.0, max_minutes=1e-6), tmp_path, **settings)
    as_earlier_versions_wrote(tmp_path)
    found = search(float_run, target, tmp_path, resume=True, **settings)
    rungs = [attempt.rung for attempt in found.attempts]
    assert "bias_correction" in rungs
    assert not {"sequential_mse", "adaround_blocks"} & {*rungs}
    assert rungs[:2] == ["static", "observer_min_max"], "in the order that they had"
    assert not (tmp_path / "sources.json").exists()
    as_earlier_versions_wrote(tmp_path)
    again = search(float_run, target, tmp_path, resume=True, **settings)
    assert again.attempts == found.attempts
    assert again.best == found.best


def as_earlier_versions_wrote(folder: Path) -> None:
    """Take out of the files of a search what its first version did not write."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        for settings in (content, content.get("plan", {})):
            for name in ("rungs", "order", "adaround_blocks", "sequential_mse"):
                settings.pop(name, None)
        for settings, name in ((content.get("limits", {}), "confident"), (content.get("parts", {}), "means")):
            settings.pop(name, None)
        content.pop("batches", None)
        path.write_text(json.dumps(content))
