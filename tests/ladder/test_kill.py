"""A search that is killed at any moment and goes on ends with the same choice as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.nightly import nightly_except

ROOT = Path(__file__).parents[2]
SAME = ("rung", "tried", "drop", "low", "high", "size_mb", "verdict", "chosen")
"""All of a rung but how long something took."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("kills", nightly_except([3, 10], 3))
def test_kills_at_any_moment_change_nothing(kills: int, tmp_path: Path) -> None:
    seed = int(os.environ.get("QAT_STRESS_SEED", random.SystemRandom().randrange(10**6)))
    command = [sys.executable, "-m", "tests.ladder.killing", str(tmp_path), str(kills), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"QAT_STRESS_SEED={seed}:\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= kills // 2, f"QAT_STRESS_SEED={seed}"
    whole, killed = ([{key: row[key] for key in SAME} for row in found[name]["rows"]] for name in ("whole", "killed"))
    assert killed == whole, f"QAT_STRESS_SEED={seed}"
    assert len(whole) > 6
    assert found["killed"]["conclusion"] == found["whole"]["conclusion"]


STOPPED = """
import os, signal, sys
from pathlib import Path
import torch
from tests.ladder.killing import search
from tests.ladder.lit import Data, trained

folder, read, calls = Path(sys.argv[1]), Data.train_dataloader, []
torch.save(trained()[0].state_dict(), folder / "float.pt")

def stopping(data):
    calls.append(len(calls))
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return read(data)

Data.train_dataloader = stopping
search(folder / "searched")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_sigterm_ends_a_search_at_once_also_while_it_calibrates(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert (tmp_path / "searched" / "float.json").is_file()
    assert len(list((tmp_path / "searched" / "rungs").glob("*/measured.json"))) < 4
