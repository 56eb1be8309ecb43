"""Int8 against fp32 eager, batch 1: ``python -m benchmarks.latency [--network resnet18] [--rounds 7]``.

Each engine runs in a process of its own, so that no engine's threads disturb another's. The processes take turns, round
after round, and a row's figure is the median of its rounds; a ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe

ENGINES = {
    "fp32 eager": ("float", ""),
    "int8 fx x86": ("fx", "x86"),
    "int8 pt2e x86": ("pt2e", "x86"),
    "int8 eager x86": ("eager", "x86"),
}


def worker(network_name: str, mode: str, backend: str, size: int) -> None:
    """Build one engine, then measure once for each line on standard input."""
    import torch

    from benchmarks.networks import NETWORKS
    from qat_lightning.flows.base import Example, cpu_copy, get_flow, set_phase
    from qat_lightning.measure import latency_ms
    from qat_lightning.quantized import QuantizedNetwork
    from qat_lightning.recipe import Recipe

    torch.manual_seed(0)
    network = NETWORKS[network_name]()
    images = torch.randn(4, 3, size, size)
    runs = ""
    if mode == "float":
        engine = network.eval()
    else:
        flow = get_flow(mode)
        recipe = Recipe(mode, backend)
        prepared = flow.prepare(network, Example((images,)), recipe)
        set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
        prepared.train()
        with torch.no_grad():
            for _ in range(3):
                prepared(torch.randn(4, 3, size, size))
        converted = flow.convert(cpu_copy(prepared), Example((images,)))
        engine = QuantizedNetwork(converted, recipe, Example((images,)))
        with torch.inference_mode():
            engine(images[:1])
        runs = str(getattr(converted.network, "runs", ""))
    print(f"ready {runs}".strip(), flush=True)
    for _ in sys.stdin:
        print(latency_ms(engine, (images[:1],), min_run_time=1.0).median_ms, flush=True)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18", choices=["resnet18", "mobilenetv2"])
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", nargs=2, metavar=("MODE", "BACKEND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.network, *options.worker, options.size)
        return
    command = [sys.executable, "-m", "benchmarks.latency", "--network", options.network, "--size", str(options.size)]
    workers = {}
    for name, (mode, backend) in ENGINES.items():
        process = subprocess.Popen(
            [*command, "--worker", mode, backend], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        workers[name] = process, _line(process, name)
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(options.rounds):
        for name, (process, _) in workers.items():
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            times[name].append(float(_line(process, name)))
    for process, _ in workers.values():
        process.communicate()
    table = Table(title=f"{options.network}, batch 1, {options.size}x{options.size}", caption=describe())
    for column in ("engine", "median ms", "fastest", "slowest", "times faster than fp32 eager"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    base = times["fp32 eager"]
    for name, values in times.items():
        runs = workers[name][1].removeprefix("ready").strip()
        ratio = statistics.median(b / v for b, v in zip(base, values, strict=True))
        table.add_row(
            f"{name}{f' ({runs})' if runs else ''}",
            f"{statistics.median(values):.2f}",
            f"{min(values):.2f}",
            f"{max(values):.2f}",
            f"{ratio:.2f}",
        )
    Console(width=110).print(table)


def _line(process: subprocess.Popen[str], name: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready") or line.strip().replace(".", "", 1).replace("e-", "", 1).isdigit():
            return line.strip()
    raise SystemExit(f"{name} ended with exit code {process.wait()}; its messages are above.")


if __name__ == "__main__":
    main()
