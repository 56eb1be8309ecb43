"""A fit killed anywhere and resumed from its last checkpoint ends, bit by bit, like the uninterrupted one.

The kill points are random; ``QAT_STRESS_SEED=n`` in the environment repeats those of a failed run.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.stress.campaign import MODES, Campaign, Life, campaign, differences, modes_of
from tests.stress.server import Server
from tests.stress.worker import Kill, Run
from tests.support.nightly import nightly_except

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@pytest.fixture(scope="module")
def lives() -> Iterator[Campaign]:
    seed = int(os.environ.get("QAT_STRESS_SEED", random.SystemRandom().randrange(10**6)))
    with campaign(seed) as drawn:
        yield drawn


def _killed_and_equal(lives: Campaign, mode: str, kills: int, kind: str = "plain") -> None:
    print(f"QAT_STRESS_SEED={lives.seed}")  # noqa: T201 - shown where a test fails
    found: list[Life] = []
    while sum(len(life.kills) for life in found) < kills:
        found.append(lives.live(mode, lives.random.choice((1, 1, 2, 3)), kind))
    lost = [str(life) for life in found if life.differ]
    assert not lost, f"QAT_STRESS_SEED={lives.seed}:\n" + "\n".join(lost)


@pytest.mark.slow
@pytest.mark.parametrize("mode", nightly_except(MODES, "fx"))
def test_killed_anywhere(lives: Campaign, mode: str) -> None:
    _killed_and_equal(lives, mode, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", nightly_except(["dynamic", "weight_only", "w4a8_token", "taught", "adapters"], "w4a8_token")
)
def test_killed_anywhere_on_grids_without_calibration(lives: Campaign, kind: str) -> None:
    if kind == "adapters":
        pytest.importorskip("peft")
    for mode in modes_of(kind):
        _killed_and_equal(lives, mode, 3, kind)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", MODES)
def test_killed_anywhere_many_times(lives: Campaign, mode: str) -> None:
    _killed_and_equal(lives, mode, 25)


def _after(lives: Campaign, run: Run, *kills: Kill) -> list[str]:
    """The differences after these kills."""
    run = replace(run, folder=tempfile.mkdtemp(dir=lives.folder))
    reference = lives.reference(run)
    for kill in kills:
        outcome = lives.server.run(replace(run, kill=kill))
        assert outcome.status == "killed", outcome
    outcome = lives.server.run(run)
    assert outcome.status == "ended", (Path(run.folder) / "log.txt").read_text()[-2000:]
    return differences(reference, run)


@pytest.mark.slow
def test_a_fit_that_stops_is_found_and_says_where(tmp_path: Path) -> None:
    """The test of the watchdog itself."""
    with Server(idle=4.0) as server:
        outcome = server.run(Run("eager", str(tmp_path), kill=Kill("step", 2, stops=True)))
    assert (outcome.status, outcome.where) == ("hung", "step 2")
    assert "in on_train_batch_start" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_resumed_at_the_end_of_an_epoch_and_killed_again(lives: Campaign) -> None:
    """Lightning takes the checkpoints of such a run for those of a finished epoch."""
    kills = Kill("validate", 0, calls=5), Kill("step", 6, calls=50)
    assert not _after(lives, Run("eager", ""), *kills)


@pytest.mark.slow
def test_resumed_under_accumulation_and_killed_again(lives: Campaign) -> None:
    """Lightning saves the step that it resumed from again, within the gradient accumulation."""
    kills = Kill("step", 5, calls=50), Kill("save_last", 6, calls=50)
    assert not _after(lives, Run("eager", "", accumulate=2), *kills)


@pytest.mark.slow
def test_a_checkpoint_is_whole_wherever_its_writing_ends(lives: Campaign, tmp_path: Path) -> None:
    """Also if temporary files are on another file system, from which Lightning would copy."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        run = Run("eager", "", temporary=elsewhere)
        calls = lives.reference(run).calls["save_last 6"]
        for left in range(4, 132, 4):
            folder = tmp_path / str(left)
            folder.mkdir()
            kill = Kill("save_last", 6, calls=calls - left)
            outcome = lives.server.run(replace(run, folder=str(folder), kill=kill))
            assert outcome.where == "save_last 6"
            for path in (folder / "last.ckpt", *folder.glob("*.ckpt")):
                assert torch.load(path, weights_only=True)["global_step"] in (5, 6)
