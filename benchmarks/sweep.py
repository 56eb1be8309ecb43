"""A sweep with joblib and a shared float run, compared with sequential trials: ``python -m benchmarks.sweep``.

Twelve trials (methods qat and ptq, modes eager and fx, three seeds) of the small MobileNet on digits, each compared
with a float run of equal length. In one setup each trial has its own float run and trials run one after the other in
the basic launcher; in the other, trials share one float run per seed and run with joblib on two cores. Every process
uses one thread. The sweeps alternate, ``--rounds`` times.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe

TRAIN = Path(__file__).parents[1] / "train.py"
GRID = ["method=qat,ptq", "mode=eager,fx", "seed=0,1,2"]
PLAIN = ["logger=csv", "trainer=cpu", "callbacks.rich_progress_bar=null"]
# A separate folder for each trial: the same float run, but not shared.
WAYS = {
    "basic, a float run for each trial": ["baseline=shared", "baseline.folder=${paths.output_dir}/baseline"],
    "joblib on 2 cores, shared float run": ["baseline=shared", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "basic, no float run at all": ["baseline=none"],
}


def run(words: list[str], epochs: int) -> float:
    """Return the seconds of a sweep, from the command to its table, without caches of earlier ones."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), "-m", *GRID, *PLAIN, f"trainer.max_epochs={epochs}", *words]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    return seconds


def main() -> None:
    """Run the sweeps alternately and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, words in WAYS.items():
            seconds[way].append(run(words, options.epochs))
    base, *_ = seconds.values()
    table = Table(title=f"12 trials of {options.epochs} epochs, {options.rounds} rounds", caption=describe())
    table.add_column("sweep")
    for column in ("median s", "fastest", "slowest", "share of the first"):
        table.add_column(column, justify="right")
    for way, times in seconds.items():
        share = median(time / first for time, first in zip(times, base, strict=True))
        table.add_row(way, *(f"{value:.1f}" for value in (median(times), min(times), max(times))), f"{share:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
