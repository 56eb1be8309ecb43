"""Latency of int8, fp32 and other tools: ``python -m benchmarks.latency [--networks …] [--batches 1 32] [--rounds 7]``.

Each engine runs in its own process, so that threads of different engines do not interfere. The processes alternate, and
a row reports the median over rounds; a ratio is the median of the ratios within a round. Tools that are not installed
have a row with the installation command: ``pip install 'qat-lightning[benchmarks,onnx,openvino]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engines import ENGINES, FOLDER, images
from benchmarks.machine import describe
from benchmarks.networks import NETWORKS

_SECONDS = 0.7
_READY = "ready"


def worker(engine: str, network: str) -> None:
    """Create one engine, then measure the batch size in each line of standard input."""
    warnings.filterwarnings("ignore")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run = ENGINES[engine].make(network)
    except ImportError as error:
        needs = ENGINES[engine].needs
        print(f"not installed: pip install {needs}" if needs else f"{error}", flush=True)
        return
    except Exception as error:  # noqa: BLE001 (reported in a row of the table)
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
        return
    size = sum(file.stat().st_size for file in FOLDER.glob("int8*"))
    print(f"{_READY} {size}", flush=True)
    for line in sys.stdin:
        print(_median_ms(run, images(int(line))), flush=True)


def _median_ms(run: Any, batch: Any) -> float:
    import torch

    times: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            run(batch)
        end = time.perf_counter() + _SECONDS
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            run(batch)
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


class Worker:
    """The process of an engine.

    Args:
        engine: Name of the engine.
        network: The network that it runs.
    """

    def __init__(self, engine: str, network: str) -> None:
        command = [sys.executable, "-m", "benchmarks.latency", "--worker", engine, network]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.says = self._line()

    @property
    def ready(self) -> bool:
        """Whether it can measure; otherwise `says` is the reason."""
        return self.says.startswith(_READY)

    @property
    def size_mb(self) -> float:
        """Size of the int8 network's files; 0 if there are none."""
        return int(self.says.partition(" ")[2]) / 1e6

    def measure(self, batch: int) -> float:
        """Return the median time of a call in this round, in milliseconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        return float(self._line())

    def end(self) -> None:
        """End the process."""
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip() or f"ended with exit code {self.process.wait()}"


def measure(
    network: str, options: argparse.Namespace
) -> tuple[dict[int, dict[str, list[float] | str]], dict[str, str]]:
    """Return, by batch size and engine, the median of each round, or why there is none; and file sizes in MB."""
    workers = {engine: Worker(engine, network) for engine in options.engines}
    sizes = {engine: f"{worker.size_mb:.1f}" for engine, worker in workers.items() if worker.ready and worker.size_mb}
    figures: dict[int, dict[str, list[float] | str]] = {}
    for batch in options.batches:
        ready = [engine for engine, worker in workers.items() if worker.ready]
        times: dict[str, list[float]] = {engine: [] for engine in ready}
        for number in range(options.rounds):
            for engine in ready if number % 2 == 0 else reversed(ready):
                times[engine].append(workers[engine].measure(batch))
        figures[batch] = {engine: times.get(engine, worker.says) for engine, worker in workers.items()}
    for worker in workers.values():
        worker.end()
    return figures, sizes


def make_table(network: str, batch: int, figures: dict[str, list[float] | str], sizes: dict[str, str]) -> Table:
    """Return one row per engine; the fastest int8 engines of ours and of others are marked."""
    table = Table(title=f"{network}, batch {batch}, 224x224", caption=describe())
    for column in ("engine", "whose", "median ms", "fastest", "slowest", "times faster than fp32 eager", "file MB"):
        table.add_column(column, justify="left" if column in ("engine", "whose") else "right")
    medians = {engine: statistics.median(values) for engine, values in figures.items() if not isinstance(values, str)}
    best = {
        min(found, key=medians.__getitem__)
        for whose in ("ours", "peer")
        if (found := [engine for engine in medians if ENGINES[engine].whose == whose and ENGINES[engine].int8])
    }
    base = figures.get("fp32 eager")
    for engine, values in figures.items():
        name = f"[bold]{engine} *[/bold]" if engine in best else engine
        if isinstance(values, str):
            table.add_row(name, ENGINES[engine].whose, values)
            continue
        ratio = ""
        if base and not isinstance(base, str):
            ratio = f"{statistics.median(b / v for b, v in zip(base, values, strict=True)):.2f}"
        numbers = (medians[engine], min(values), max(values))
        table.add_row(name, ENGINES[engine].whose, *(f"{value:.2f}" for value in numbers), ratio, sizes.get(engine, ""))
    return table


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file to append the figures to, a line for each table")
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "NETWORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    for network in options.networks:
        measured, sizes = measure(network, options)
        for batch, figures in measured.items():
            Console(width=130).print(make_table(network, batch, figures, sizes))
            if options.json:
                row = {"network": network, "batch": batch, "figures": figures, "sizes_mb": sizes}
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
