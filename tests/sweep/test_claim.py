"""Each run has its own folder: none is shared, and none is overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from qat_lightning.errors import ConfigurationError
from qat_lightning.json_files import write_json
from qat_lightning.sweep import claim
from qat_lightning.sweep.claim import RunFolder, check_run_folder, hold, sweep_folder_of_its_own, unused
from qat_lightning.sweep.result import IDENTITY, TrialResult

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    while claim._held:
        claim._held.pop().release()


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def test_folders_asked_for_at_once_are_all_different(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: unused(tmp_path / "12-00-00"), range(8)))
    assert sorted(path.name for path in got) == ["12-00-00", *(f"12-00-00-{number}" for number in range(2, 9))]


def test_two_runs_of_the_same_second_have_two_folders() -> None:
    first, second = composed(), composed()
    second.hydra.run.dir = first.hydra.run.dir = "outputs/2026-01-31/12-00-00"
    for config in (first, second):
        RunFolder().on_run_start(config)
    assert first.hydra.run.dir == "outputs/2026-01-31/12-00-00"
    assert second.hydra.run.dir == "outputs/2026-01-31/12-00-00-2"
    assert Path(second.hydra.run.dir).is_dir()


def test_two_sweeps_of_the_same_second_have_two_folders_and_so_have_their_trials() -> None:
    configs = [composed(), composed()]
    folders = []
    for config in configs:
        config.hydra.sweep.dir = "multirun/12-00-00"
        folders.append(sweep_folder_of_its_own(config, Path("multirun/12-00-00")))
    assert folders == [Path("multirun/12-00-00"), Path("multirun/12-00-00-2")]
    assert configs[1].hydra.sweep.dir == "multirun/12-00-00-2"
    # What Hydra composes the configuration of a trial from.
    assert composed(*configs[1].hydra.overrides.hydra).hydra.sweep.dir == "multirun/12-00-00-2"


def test_a_folder_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder().on_run_start(composed("hydra.run.dir=mine"))
    with pytest.raises(SystemExit):
        RunFolder().on_run_start(composed("hydra.run.dir=mine"))
    assert "Another process is running in mine" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(ConfigurationError, match=r"give another hydra\.sweep\.dir="):
        hold(Path("mine"), "hydra.sweep.dir")


@pytest.mark.parametrize("status", ["completed", "failed", None])
def test_a_folder_with_a_run_is_refused_without_resume(status: str | None, tmp_path: Path) -> None:
    write_json(tmp_path / IDENTITY, {"overrides": ["mode=fx"]})
    if status:
        TrialResult(status, ["mode=fx"]).write(tmp_path)
    said = status or "not finished"
    with pytest.raises(ConfigurationError, match=rf"already holds a run \({said}\): resume=true continues"):
        check_run_folder(tmp_path, ["mode=fx"], resume=False)
    check_run_folder(tmp_path, ["mode=fx"], resume=True)
    with pytest.raises(ConfigurationError, match="was started with mode=fx, and this one with mode=pt2e"):
        check_run_folder(tmp_path, ["mode=pt2e"], resume=True)


def test_a_run_that_goes_on_keeps_its_folder() -> None:
    write_json(Path("mine") / IDENTITY, {"overrides": ["seed=1"]})
    config = composed("hydra.run.dir=mine", "seed=1", "resume=true")
    RunFolder().on_run_start(config)
    assert config.hydra.run.dir == "mine"
    assert config.hydra.output_subdir is None, "what it began with is not written over"
