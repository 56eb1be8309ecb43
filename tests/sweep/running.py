"""Sweeps of train.py in a separate process, with tiny settings, and their runs read with W&B's reader."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "train.py"
TINY = [
    "debug=fast",
    "trainer=cpu",
    "data.datamodule.batch_size=16",
    "model.module.net.width=8",
    "callbacks.rich_progress_bar=null",
]
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith(("HYDRA_", "WANDB_"))},
    "WANDB_MODE": "offline",
    "COLUMNS": "160",
    "PYTHONPATH": str(ROOT / "src"),
    "QAT_LIGHTNING_COMPILE": "0",
}


def sweep(folder: Path, *words: str, script: Path = TRAIN) -> subprocess.CompletedProcess[str]:
    """`python train.py -m WORDS`, into the folder `sweep`."""
    command = [sys.executable, str(script), "-m", "hydra.sweep.dir=sweep", *TINY, *words]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def results(folder: Path, name: str = "sweep") -> dict[int, dict[str, Any]]:
    """The result of each trial of a sweep, by its number."""
    return {int(path.parent.name): json.loads(path.read_text()) for path in (folder / name).glob("*/result.json")}


def statuses(folder: Path) -> dict[int, str]:
    return {number: result["status"] for number, result in sorted(results(folder).items())}


def offline_runs(folder: Path) -> list[dict[str, Any]]:
    """Every offline run below a folder, read with W&B's own reader."""
    found = sorted(path for path in folder.rglob("offline-run-*") if path.is_dir())
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
    return [json.loads(subprocess.check_output([*command, str(path)], text=True)) for path in found]
