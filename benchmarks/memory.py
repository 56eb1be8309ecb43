"""The memory of a step of quantization-aware training against float's: ``python -m benchmarks.memory``.

Each row is a process of its own. Two figures: what the step holds at its peak (on a CPU the resident memory of the
process at its highest in one step, less what it was before the network was made, with an allocator that gives freed
memory back at once; on a GPU ``torch.cuda.max_memory_allocated``), and the tensors that are kept for the backward pass,
each counted once.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.qat_step import OURS, PEERS, prepare, step_of

ROWS = ["float", *(row for row in OURS if "compile" not in row), "fx, compile", *PEERS]


def resident(key: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at the highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def worker(row: str, options: argparse.Namespace) -> dict[str, int]:
    """Measure one row."""
    import torch

    from benchmarks.networks import NETWORKS

    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    # What is there for any network: the code of torch, of this library or of the peer.
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).to(device).train()
    first = small if row == "float" else prepare(row, small, torch.randn(2, 3, 8, 8, device=device))
    first(torch.randn(2, 3, 8, 8, device=device)).sum().backward()
    del first, small
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap would be taken for the network, and not be counted
    before = resident("VmRSS")
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (options.batch,), device=device)
    network = NETWORKS[options.network]().to(device, memory_format=torch.channels_last).train()
    if row != "float":
        network = prepare(row, network, images)
    step = step_of(network, network.parameters(), images, labels, autocast=False)
    for _ in range(3):
        step()
    return {"peak": _peak(step, device, before), "kept": _kept(step)}


def _peak(step: Any, device: Any, before: int) -> int:
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # begins the highest anew
    step()
    return resident("VmHWM") - before


def _kept(step: Any) -> int:
    import torch

    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is given away twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18", choices=["resnet18", "mobilenetv2"])
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment with the peers")
    parser.add_argument("--worker", metavar="ROW", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print("result", json.dumps(worker(options.worker, options)), flush=True)
        return
    rows = ["float", *(row for row in options.rows if row != "float")]
    settings = ["--network", options.network, "--device", options.device]
    for name in ("size", "batch", "threads"):
        settings += [f"--{name}", str(getattr(options, name))]
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[str, dict[str, int]] = {}
    table = Table(title=f"{options.network}, batch {options.batch}, {options.size}x{options.size}", caption=describe())
    for column in ("step", "peak MB", "ratio", "kept for backward MB", "ratio"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        python = options.python if row in PEERS else sys.executable
        command = [python, "-W", "ignore", "-m", "benchmarks.memory", *settings, "--worker", row]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        results = [line for line in done.stdout.splitlines() if line.startswith("result ")]
        if not results:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            hint = f"{PEERS.get(row)}: " if "No module named" in last and PEERS.get(row) else ""
            table.add_row(row, f"{hint}{last}"[:60], "", "", "")
            continue
        found[row] = json.loads(results[0].removeprefix("result "))
        cells = [
            cell
            for key in ("peak", "kept")
            for cell in (f"{found[row][key] / 1e6:.0f}", f"{found[row][key] / found['float'][key]:.2f}")
        ]
        table.add_row(row, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
