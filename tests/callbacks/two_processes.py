"""Starts a program that trains in two processes, and reads what each of them wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_two(program: str, folder: Path, *arguments: str, compile: str = "0") -> Path:
    """Run a module whose Trainers have ``devices=2``: Lightning starts it once more.

    Args:
        program: Its dotted name.
        folder: Where both processes write.
        arguments: More of them.
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
    """The errors of both processes: where one fails, the other loses its connection, and says so at more length."""
    errors = [line for line in said.splitlines() if "Error" in line]
    return "\n".join(errors[:8]) + "\n\n" + said[-3000:]


def read_both(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON of the first process, and that of the second."""
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    return first, second
