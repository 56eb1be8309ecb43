"""A search that is killed at any moment and goes on ends with the same choice as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SAME = ("rung", "tried", "drop", "low", "high", "size_mb", "verdict", "chosen")
"""All of a rung but how long something took."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("QAT_STRESS_SEED", random.SystemRandom().randrange(10**6)))
    command = [sys.executable, "-m", "tests.ladder.killing", str(tmp_path), "10", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"QAT_STRESS_SEED={seed}:\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 5, f"QAT_STRESS_SEED={seed}"
    whole, killed = ([{key: row[key] for key in SAME} for row in found[name]["rows"]] for name in ("whole", "killed"))
    assert killed == whole, f"QAT_STRESS_SEED={seed}"
    assert len(whole) > 6
    assert found["killed"]["conclusion"] == found["whole"]["conclusion"]
