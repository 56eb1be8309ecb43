"""Cost of a rehearsal relative to ``prepare``: ``python -m benchmarks.rehearsal [--networks …] [--modes …]``.

For each network and mode, alternating over rounds: preparation alone, and the whole rehearsal (prepare a copy,
calibrate, convert, verify, save and load in memory; nothing is compiled). Reports the median of the ratios within a
round. For
comparison: preparation in a fit, which reuses what the rehearsal captured, and 20 training steps of the float network
with batch size 32. Seconds are CPU time with one thread, which other work on the machine affects little. ``auto`` has
its own
row: it rehearses as many modes as needed. Also reported is the memory that the process keeps after a rehearsal. The ViT
uses its own image size, whatever ``--size`` says.
"""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import describe
from benchmarks.networks import NETWORKS, UNet
from benchmarks.photos import SIDE
from qat_lightning.graph.example import Example
from qat_lightning.modes.captured_once import captured_once
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.auto import decide
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe

MODES = ("fx", "eager", "pt2e")
REHEARSED: dict[str, Callable[[], nn.Module]] = {
    name: NETWORKS[name] for name in ("resnet18", "mobilenetv2", "vit_tiny")
} | {"unet": UNet}


def _seconds(run: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(network: nn.Module, example: Example, mode: str, rounds: int) -> tuple[float, float, float, float, float]:
    """Return medians of the seconds of prepare, of rehearse and of prepare after it, of ratios, and of retained MB."""
    recipe = Recipe(mode, "x86")
    pairs, held = [], []
    for _ in range(rounds + 1):
        copied = copy.deepcopy(network)
        prepare = _seconds(lambda copied=copied: get_mode(mode).prepare(copied, example, recipe))
        del copied
        before, copied = _resident_mb(), copy.deepcopy(network)
        with captured_once():
            whole = _seconds(lambda: rehearse(network, example, recipe))
            after = _seconds(lambda copied=copied: get_mode(mode).prepare(copied, example, recipe))
        pairs.append((prepare, whole, after))
        del copied
        gc.collect()
        held.append(_resident_mb() - before)
    pairs, held = pairs[1:], held[1:]  # the first is a warm-up
    alone, whole, after = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    ratio = statistics.median(rehearsed / prepared for prepared, rehearsed, _ in pairs)
    return alone, whole, after, ratio, statistics.median(held)


def training_steps(network: nn.Module, shape: torch.Size, count: int = 20) -> float:
    """Estimate the seconds of ``count`` float steps with batch size 32, from two steps after a warm-up."""
    copied, x = copy.deepcopy(network).train(), torch.randn(32, *shape[1:])
    optimizer = torch.optim.SGD(copied.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        copied(x).mean().backward()
        optimizer.step()

    step()
    return count * statistics.median(_seconds(step) for _ in range(2))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--networks", nargs="+", default=list(REHEARSED), choices=list(REHEARSED))
    parser.add_argument("--modes", nargs="+", default=[*MODES, "auto"], choices=[*MODES, "auto"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = Table(title=f"rehearse against prepare, batch {options.batch}, {options.size}x{options.size}")
    for column in ("network", "mode", "prepare, s", "rehearse, s", "prepare then, s", "ratio", "MB that stay"):
        table.add_column(column)
    for name in options.networks:
        torch.manual_seed(0)
        size = SIDE if name == "vit_tiny" else options.size
        network, example = REHEARSED[name](), Example((torch.randn(options.batch, 3, size, size),))
        table.add_row(name, "20 steps", f"{training_steps(network, example.args[0].shape):.1f}", "", "", "", "")
        for mode in options.modes:
            if mode == "auto":
                seconds = _seconds(lambda n=network, e=example: decide("auto", n, e, lambda m: Recipe(m, "x86")))
                table.add_row(name, mode, "", f"{seconds:.1f}", "", "", "")
                continue
            alone, whole, after, ratio, held = measure(network, example, mode, options.rounds)
            figures = f"{alone:.2f}", f"{whole:.2f}", f"{after:.2f}", f"{ratio:.2f}", f"{held:.0f}"
            table.add_row(name, mode, *figures)
    Console().print(table)
    print(describe())


if __name__ == "__main__":
    main()
