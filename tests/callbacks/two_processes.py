"""Starts a program that trains in two processes, and reads the results of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_two(program: str, folder: Path, *arguments: str, compile: str = "0") -> Path:
    """Run a module whose Trainers have ``devices=2``; Lightning launches it again for the second process.

    Args:
        program: Its dotted name.
        folder: Folder for the results of both processes.
        arguments: Additional arguments.
        compile: Whether int8 networks of mode pt2e are compiled.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PL_", "LOCAL_", "NODE_"))}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "QAT_LIGHTNING_COMPILE": compile}
    ran = subprocess.run(
        [sys.executable, "-m", program, str(folder), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, _what_went_wrong(ran.stderr)
    return folder


def _what_went_wrong(said: str) -> str:
    """The errors of both processes: if one fails, the other's lost connection gives a longer message."""
    errors = [line for line in said.splitlines() if "Error" in line]
    return "\n".join(errors[:8]) + "\n\n" + said[-3000:]


def read_both(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON results of the first and the second process."""
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    return first, second
