"""What a rehearsal costs, in times of ``prepare``: ``python -m benchmarks.rehearsal [--networks …] [--modes …]``.

For each network and mode, in turn, round after round: the preparation alone, and the whole rehearsal (prepare a copy,
calibrate it, convert, verify, save and load in memory; nothing is compiled). The figure is the median of the ratios
within a round. Seconds are those of the processor, with one thread, so that what else runs on the machine counts
little. ``auto`` has a row of its own: it rehearses as many modes as it has to. Also printed is how much memory the
process holds after a rehearsal that it did not hold before. The ViT takes images of its own size, whatever ``--size``
says.
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


def measure(network: nn.Module, example: Example, mode: str, rounds: int) -> tuple[float, float, float, float]:
    """Median seconds of prepare and of rehearse, the median of their ratios, and the MB that stay."""
    recipe = Recipe(mode, "x86")
    pairs, held = [], []
    for _ in range(rounds + 1):
        copied = copy.deepcopy(network)
        prepare = _seconds(lambda copied=copied: get_mode(mode).prepare(copied, example, recipe))
        del copied
        before = _resident_mb()
        pairs.append((prepare, _seconds(lambda: rehearse(network, example, recipe))))
        gc.collect()
        held.append(_resident_mb() - before)
    pairs, held = pairs[1:], held[1:]  # the first warms up
    ratio = statistics.median(whole / alone for alone, whole in pairs)
    return (
        statistics.median(p for p, _ in pairs),
        statistics.median(r for _, r in pairs),
        ratio,
        statistics.median(held),
    )


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
    for column in ("network", "mode", "prepare, s", "rehearse, s", "ratio", "MB that stay"):
        table.add_column(column)
    for name in options.networks:
        torch.manual_seed(0)
        size = SIDE if name == "vit_tiny" else options.size
        network, example = REHEARSED[name](), Example((torch.randn(options.batch, 3, size, size),))
        for mode in options.modes:
            if mode == "auto":
                seconds = _seconds(lambda n=network, e=example: decide("auto", n, e, lambda m: Recipe(m, "x86")))
                table.add_row(name, mode, "", f"{seconds:.1f}", "", "")
                continue
            alone, whole, ratio, held = measure(network, example, mode, options.rounds)
            table.add_row(name, mode, f"{alone:.2f}", f"{whole:.2f}", f"{ratio:.2f}", f"{held:.0f}")
    Console().print(table)
    print(describe())


if __name__ == "__main__":
    main()
