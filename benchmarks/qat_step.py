"""Time of a training step relative to float: ``python -m benchmarks.qat_step [--network mobilenetv2]``.

Forward, backward and SGD in channels_last. Each row runs in its own process, in which its step and the float step
alternate, so that a ratio is between steps measured together; the result is the median of the rounds' ratios. With
``--clock cpu`` the process's CPU time is measured, which other work on the machine affects less than wall-clock time.
Packages for other tools are in the extra ``benchmarks``; ``--python`` is the interpreter of an environment that has
them, if this one does not.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.peers import PEERS
from benchmarks.within import run_within

SCHEMES = {
    "lsq": {"learned_step": "lsq"},
    "percentile": {"activation_observer": "percentile"},
    "least error": {"activation_observer": "histogram_mse"},
}
"""Schemes of rows that do not use the default, by name."""

OURS = {
    f"{mode}{f', {what}' if what else ''}{', compile' if compiled else ''}": (mode, what, compiled)
    for what in ("", "folded", *SCHEMES)
    for mode in ("eager", "fx", "pt2e")
    for compiled in (False, True)
}
"""Rows of this library: mode, variation, and whether it is compiled."""

ROWS = ["float, compile", *OURS, *PEERS]


def prepare(row: str, network: Any, images: Any) -> Any:
    """Return the network of a row, ready to train."""
    import torch

    if row == "float, compile":
        return torch.compile(network)
    if row in OURS:
        return _ours(*OURS[row], network, images)
    return PEERS[row].prepare(network, [images], False)


def _ours(mode: str, what: str, compiled: bool, network: Any, images: Any) -> Any:
    from qat_lightning.graph.example import Example
    from qat_lightning.modes.compiling import CompiledSteps
    from qat_lightning.modes.prepared import set_phase
    from qat_lightning.modes.registry import get_mode
    from qat_lightning.recipes.folding import fold_batchnorm
    from qat_lightning.settings.recipe import Recipe
    from qat_lightning.settings.scheme import Scheme

    example = Example((images[:2].clone(),))
    if what == "folded":
        fold_batchnorm(network, example)
    scheme = Scheme(**SCHEMES.get(what, {}))  # type: ignore[arg-type]
    prepared = get_mode(mode).prepare(network, example, Recipe(mode, "x86", scheme))
    prepared.to(images.device).train()
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    if compiled:
        CompiledSteps(prepared, prepared, row_name(mode, what))
    return prepared


def row_name(mode: str, what: str) -> str:
    """Return the name of a row."""
    return f"{mode} {what}".strip()


def step_of(network: Any, parameters: Any, images: Any, labels: Any, *, autocast: bool) -> Callable[[], None]:
    """Return a function that runs one training step."""
    import torch

    optimizer = torch.optim.SGD(parameters, 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        if images.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def worker(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one row, alternating with the float step."""
    import torch

    from benchmarks.networks import NETWORKS

    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (options.batch,), device=device)
    plain = NETWORKS[options.network]().to(device, memory_format=torch.channels_last).train()
    prepared = prepare(row, copy.deepcopy(plain), images)
    steps = {
        name: step_of(network, network.parameters(), images, labels, autocast=options.autocast)  # type: ignore[attr-defined]
        for name, network in (("float", plain), ("row", prepared))
    }
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    return in_turn(steps, options.rounds, options.warmup, clock)


def in_turn(
    steps: Mapping[str, Callable[[], None]],
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the milliseconds of each step in each round; the steps alternate within a round.

    Args:
        steps: Functions to time, by name.
        rounds: Number of counted rounds.
        warmup: Number of rounds before them.
        clock: Returns seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warmup + rounds):
        for name, step in steps.items():
            begin = clock()
            step()
            if index >= warmup:
                times[name].append(1e3 * (clock() - begin))
    return times


def add_arguments(parser: argparse.ArgumentParser, rows: Sequence[str]) -> None:
    """Return the options of this benchmark and of `benchmarks.memory`."""
    parser.add_argument("--network", default="resnet18", choices=["resnet18", "mobilenetv2"])
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=rows, metavar="ROW", help=", ".join(rows))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment with the peers")
    parser.add_argument("--worker", metavar="ROW", help=argparse.SUPPRESS)


def ask_worker(
    module: str, row: str, options: argparse.Namespace, environment: Any = None, seconds: float | None = None
) -> dict[str, Any] | str:
    """Return the result of a row's own process, or why there is none.

    Args:
        module: The benchmark, which is run with ``--worker``.
        row: The row.
        options: The command-line options, which are passed to the worker.
        environment: Environment of the process; by default this one's.
        seconds: Time limit; None for none.
    """
    given: list[str] = []
    for name, value in vars(options).items():
        if name not in ("rows", "python", "worker") and value is not False:
            option = f"--{name.replace('_', '-')}"
            given += [option] if value is True else [option, str(value)]
    python = options.python if row in PEERS else sys.executable
    command = [python, "-W", "ignore", "-m", module, *given, "--worker", row]
    try:
        done = run_within(command, seconds, environment)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    found = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    if found:
        measured: dict[str, Any] = json.loads(found[0].removeprefix("result "))
        return measured
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    hint = PEERS[row].install if "No module named" in last and row in PEERS else ""
    return f"{hint}: {last}" if hint else last


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, ROWS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4, help="rounds that are not counted, in which graphs compile")
    parser.add_argument("--autocast", action="store_true", help="in bfloat16")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    options = parser.parse_args()
    if options.worker:
        print("result", json.dumps(worker(options.worker, options)), flush=True)
        return
    shape = f"batch {options.batch}, {options.size}x{options.size}"
    table = Table(
        title=f"{options.network}, {shape}, {options.clock} time of a step",
        caption=f"{describe()}; each row with {options.threads} thread(s)",
    )
    for column in ("step", "median ms", "float beside it", "ratio", "least", "most"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in options.rows:
        times = ask_worker("benchmarks.qat_step", row, options)
        if isinstance(times, str):
            table.add_row(row, times[:90])
            continue
        ratios = [ours / plain for ours, plain in zip(times["row"], times["float"], strict=True)]
        table.add_row(
            row,
            f"{statistics.median(times['row']):.1f}",
            f"{statistics.median(times['float']):.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
        )
        print(row, f"{statistics.median(ratios):.3f}", flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
