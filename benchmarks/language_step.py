"""Time and memory of a w4a8 training step, relative to float and torchao: ``python -m benchmarks.language_step``.

A transformer over characters; forward, backward and AdamW, with 4-bit weights in groups of 32 and 8-bit activations per
token. Each row runs in its own process, in which its step and the float step alternate; the result is the median of the
rounds' ratios. Memory is measured in a second process as in `benchmarks.memory`: the peak in a step, and the tensors
saved for the backward pass. For compiled steps the peak is not reported, since it includes the compiler's memory.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.language import PEER, peer, prepared
from benchmarks.machine import describe
from benchmarks.memory import kept_of, peak_of, resident
from benchmarks.qat_step import ask_worker

ROWS = [
    f"{what}{', compile' if compiled else ''}"
    for what in ("float", "eager", "fx", "torchao QATConfig")
    for compiled in (False, True)
]


def network_of(row: str, plain: Any, tokens: Any) -> Any:
    """Return the network of a row, ready to train."""
    import torch

    from qat_lightning import Example
    from qat_lightning.modes.compiling import CompiledSteps

    what, _, compiled = row.partition(", ")
    if what in ("eager", "fx"):
        made = prepared(plain, Example((tokens,)), PEER, mode=what).train()
        if compiled:
            CompiledSteps(made, made, what)
        return made
    made = copy.deepcopy(plain) if what == "float" else peer(plain)
    return torch.compile(made.train()) if compiled else made.train()


def step_of(network: Any, tokens: Any, targets: Any) -> Callable[[], None]:
    """Return a function that runs one training step."""
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()

    return step


def _fresh(options: argparse.Namespace, *, small: bool = False) -> tuple[Any, Any, Any]:
    import torch

    from qat_lightning.demos import CharTransformer

    torch.manual_seed(0)
    context = 8 if small else options.context
    width, depth, batch = (32, 1, 2) if small else (options.dim, options.depth, options.batch)
    tokens = torch.randint(0, 256, (batch, context))
    return CharTransformer(context=context, dim=width, depth=depth), tokens, tokens.roll(-1, 1)


def times_of(row: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the milliseconds of the row's step and of the float step, alternating."""
    plain, tokens, targets = _fresh(options)
    networks = {"row": network_of(row, plain, tokens), "float": plain.train()}
    steps = {name: step_of(network, tokens, targets) for name, network in networks.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(options.warmup + options.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if index >= options.warmup:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return taken


def memory_of(row: str, options: argparse.Namespace) -> dict[str, int]:
    """Return the bytes at the peak of a step, and saved for its backward pass."""
    import torch

    small, tokens, targets = _fresh(options, small=True)  # the code of torch, of this library or of the peer
    step_of(network_of(row, small, tokens), tokens, targets)()
    del small
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    plain, tokens, targets = _fresh(options)
    network = network_of(row, plain, tokens)
    del plain
    step = step_of(network, tokens, targets)
    for _ in range(3):
        step()
    return {"peak": peak_of(step, torch.device("cpu"), before), "kept": kept_of(step)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("dim", 256), ("depth", 4), ("context", 128), ("batch", 16), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted, in which graphs compile")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--memory", action="store_true", help="measure the memory instead of the time")
    parser.add_argument("--worker", metavar="ROW", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    options = _arguments()
    if options.worker:
        import torch

        warnings.filterwarnings("ignore")
        torch.set_num_threads(options.threads)
        measure = memory_of if options.memory else times_of
        print("result", json.dumps(measure(options.worker, options)), flush=True)
        return
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    columns = ("peak MB", "kept for backward MB") if options.memory else ("median ms", "ratio", "least", "most")
    table = Table("step", *columns, caption=describe())
    for row in options.rows:
        found = ask_worker("benchmarks.language_step", row, options, environment if options.memory else None)
        if isinstance(found, str):
            table.add_row(row, found[:60])
        elif options.memory:
            peak = "" if "compile" in row else f"{found['peak'] / 1e6:.0f}"
            table.add_row(row, peak, f"{found['kept'] / 1e6:.0f}")
        else:
            ratios = [ours / plain for ours, plain in zip(found["row"], found["float"], strict=True)]
            shown = (statistics.median(ratios), min(ratios), max(ratios))
            table.add_row(row, f"{statistics.median(found['row']):.0f}", *(f"{ratio:.2f}" for ratio in shown))
        print(row, "measured", flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
