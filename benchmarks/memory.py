"""Memory of a quantization-aware training step relative to float: ``python -m benchmarks.memory``.

Each row runs in its own process. Reports the step's peak memory, and the size of all tensors saved for the backward
pass, each counted once. The peak on a CPU is the process's peak resident memory in one step minus that before the
network was created, with an allocator that returns freed memory immediately; on a GPU it is
``torch.cuda.max_memory_allocated``.

``python -m benchmarks.memory inference`` measures int8 and float inference in each runtime instead: see
`benchmarks.inference_memory`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import inference_memory
from benchmarks.machine import describe, resident
from benchmarks.peers import PEERS
from benchmarks.qat_step import OURS, add_arguments, ask_worker, prepare, step_of

ROWS = ["float", *(row for row in OURS if "compile" not in row), "fx, compile", *PEERS]


def worker(row: str, options: argparse.Namespace) -> dict[str, int]:
    """Measure one row."""
    import torch

    from benchmarks.networks import NETWORKS

    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    # Memory that any network needs: the code of torch, of this library, or of the other tool.
    small = _small().to(device).train()
    first = small if row == "float" else prepare(row, small, torch.randn(2, 3, 8, 8, device=device))
    first(torch.randn(2, 3, 8, 8, device=device)).sum().backward()
    del first, small
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the network could use free heap memory, which is not counted
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
    return {"peak": peak_of(step, device, before), "kept": kept_of(step)}


def _small() -> Any:
    import torch

    class Small(torch.nn.Module):
        """Not a Sequential: NNCF adds a child to the prepared network, which a Sequential would call."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

        def forward(self, images: Any) -> Any:
            return torch.relu(self.bn(self.conv(images)))

    return Small()


def peak_of(step: Any, device: Any, before: int) -> int:
    """Return the peak bytes of a step: the process's memory beyond ``before``, or the GPU's."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step()
    return resident("VmHWM") - before


def kept_of(step: Any) -> int:
    """Return the bytes of the tensors that a step saves for its backward pass, each counted once."""
    import torch

    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def environment() -> dict[str, str]:
    """Return the environment of a row's process, whose allocator returns freed memory immediately."""
    return os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


def main() -> None:
    """Measure and print the table."""
    if sys.argv[1:2] == ["inference"]:
        inference_memory.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, ROWS)
    options = parser.parse_args()
    if options.worker:
        print("result", json.dumps(worker(options.worker, options)), flush=True)
        return
    table = Table(title=f"{options.network}, batch {options.batch}, {options.size}x{options.size}", caption=describe())
    for column in ("step", "peak MB", "ratio", "kept for backward MB", "ratio"):
        table.add_column(column, justify="left" if column == "step" else "right")
    plain: dict[str, int] | None = None
    for row in ["float", *(row for row in options.rows if row != "float")]:
        found = ask_worker("benchmarks.memory", row, options, environment())
        if isinstance(found, str):
            table.add_row(row, found[:60])
            continue
        plain = plain or found
        cells = [(f"{found[key] / 1e6:.0f}", f"{found[key] / plain[key]:.2f}") for key in ("peak", "kept")]
        table.add_row(row, *(cell for pair in cells for cell in pair))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
