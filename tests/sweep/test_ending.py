"""How a run ends that is stopped from outside, or launched again after it has finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf

from qat_lightning.run import app
from qat_lightning.sweep.stopping import Terminated, terminable
from qat_lightning.sweep.trial import Trial
from tests.callbacks.lit import Lit, loader, trainer
from tests.sweep.running import ENVIRONMENT, TINY, TRAIN

CFG = OmegaConf.create(
    {
        "run": {"id": None, "group": None},
        "data": {"name": "d"},
        "model": {"name": "m"},
        "ckpt_path": None,
        "objective": None,
        "isolate": True,
    }
)


class At(Callback):
    """Does something in the middle of the fit."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            self.do()


def training(do: Callable[[], None]) -> Callable[[DictConfig], tuple[dict[str, float], app.Objects]]:
    def train(cfg: DictConfig) -> tuple[dict[str, float], app.Objects]:
        fit = trainer(At(do))
        fit.fit(Lit(), loader())
        return {"int8/test/acc": 1.0}, app.Objects(fit, Lit(), None, [], [], {})  # type: ignore[arg-type]

    return train


def _interrupt() -> None:
    raise KeyboardInterrupt


def _exit() -> None:
    sys.exit(0)


@pytest.mark.parametrize(
    ("do", "code", "kind", "says"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "Terminated", "SIGTERM ended it before it was done"),
        (_interrupt, 1, "KeyboardInterrupt", "it was interrupted before it was done"),
        (_exit, 1, "SystemExit", "it ended with the status 1 before it was done"),
    ],
    ids=["sigterm", "ctrl-c", "exit"],
)
def test_a_run_that_is_ended_says_so_and_does_not_end_with_zero(
    do: Callable[[], None], code: int, kind: str, says: str, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        Trial(tmp_path, ["seed=1"], of_sweep=False, resume=False).attempt(training(do), CFG)
    signal.signal(signal.SIGINT, before)  # Lightning lets no second Ctrl-C through
    assert ended.value.code == code
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["error"]["type"]) == ("failed", kind)
    assert (
        result["error"]["message"]
        == f"{says}: the same command with hydra.run.dir={tmp_path} resume=true continues it."
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_second_sigterm_does_not_keep_the_first_from_being_recorded() -> None:
    def twice() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated), terminable():
        twice()


def test_somebody_elses_handler_stays() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


def test_an_earlier_result_does_not_outlive_the_beginning_of_a_new_attempt(tmp_path: Path) -> None:
    seen = []

    def look() -> None:
        seen.append((tmp_path / "result.json").exists())

    trial = Trial(tmp_path, [], of_sweep=False, resume=True)
    (tmp_path / "result.json").write_text('{"status": "failed", "overrides": []}')
    trial.attempt(training(look), CFG)
    assert seen == [False]
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "completed"


def _wait_for(found: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["hydra.run.dir=out"], id="run", marks=pytest.mark.nightly),
        pytest.param(["-m", "hydra.sweep.dir=out", "seed=0,1"], id="sweep"),
    ],
)
def test_sigterm_ends_train_py_with_143_and_it_goes_on_where_it_was(words: list[str], tmp_path: Path) -> None:
    settings = [*TINY, "method=float", "logger=csv", "trainer.max_epochs=200"]
    place = tmp_path / "out" / ("0" if "-m" in words else "")
    command = [sys.executable, str(TRAIN), *words, *settings]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _wait_for((place / "checkpoints" / "last.ckpt").is_file, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    result = json.loads((place / "result.json").read_text())
    assert result["status"] == "failed"
    assert "SIGTERM" in result["error"]["message"]

    def again() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "resume=true"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )

    if "-m" not in words:
        done = again()
        assert done.returncode == 0, done.stderr
        assert json.loads((place / "result.json").read_text())["status"] == "completed"
        written = (place / "result.json").stat().st_mtime_ns
        finished = again()
        assert finished.returncode == 0, finished.stderr
        assert "there is nothing to do" in finished.stdout
        assert (place / "result.json").stat().st_mtime_ns == written
