"""Memory of int8 inference relative to float: ``python -m benchmarks.memory inference``.

Each row runs in its own process, which loads a file and calls it: this library's file and a ``state_dict`` in PyTorch,
and each export format in its runtime, compared with a float file of the same format. Reports the peak resident memory
during loading and the first calls, and during later calls, including weights. With ``--whole`` it is that of the whole
process with all imports; otherwise the memory after imports and after running a network with one convolution is
subtracted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import describe, resident

if TYPE_CHECKING:
    from rich.table import Table

IN_PROCESS = ("eager", "fx", "pt2e", "pt2e, plain")
_PLAIN = ", plain"
FILES = {"torchscript": "fx", "pt2": "pt2e", "onnx": "fx", "openvino": "fx", "executorch": "pt2e"}
"""Formats, and the mode of the int8 network for each."""
PAIRS = [("PyTorch", mode) for mode in IN_PROCESS] + list(FILES.items())
SIDE = 224

Run = Callable[[Any], Any]


def build(network: str, folder: Path, rows: list[str]) -> None:
    """Write a network's files for some rows, and those of a small network; failures are written to a text file."""
    import torch

    from benchmarks.networks import NETWORKS
    from qat_lightning import Example, Recipe, convert, prepare
    from qat_lightning.export import get_format
    from qat_lightning.export.protocol import Source

    warnings.filterwarnings("ignore")
    for which, make, side in (("whole", NETWORKS[network], SIDE), ("small", _small, 32)):
        torch.manual_seed(0)
        example = Example((torch.randn(2, 3, side, side),))
        plain = make().eval()
        torch.save(plain.state_dict(), folder / f"{which}-float.pt")
        made: dict[tuple[str, str], Any] = {}
        wanted = {(_mode(row), "x86") for row in IN_PROCESS if row in rows}
        wanted |= {(mode, _backend(name)) for name, mode in FILES.items() if name in rows}
        for mode, backend in sorted(wanted):
            prepared = prepare(make().train(), example, Recipe(mode, backend))
            prepared(*example.args)
            made[mode, backend] = convert(prepared.eval(), example)
            if backend == "x86":
                made[mode, backend].save(folder / f"{which}-{mode}.int8")
        for name, mode in FILES.items():
            if name not in rows:
                continue
            form = get_format(name)
            for kind in ("float", "int8"):
                source = plain if kind == "float" else made[mode, _backend(name)]
                (folder / f"{which}-{name}-{kind}").mkdir()
                try:
                    form.write(Source(source, example), folder / f"{which}-{name}-{kind}" / f"model{form.suffix}")
                except Exception as error:  # noqa: BLE001 (reported in a row of the table)
                    (folder / f"{which}-{name}-{kind}.txt").write_text(f"{type(error).__name__}: {error}")


def _mode(row: str) -> str:
    return row.removesuffix(_PLAIN)


def _backend(name: str) -> str:
    return "xnnpack" if name == "executorch" else "x86"


def _small() -> Any:
    import torch

    layers = {
        "conv": torch.nn.Conv2d(3, 8, 3),
        "norm": torch.nn.BatchNorm2d(8),
        "relu": torch.nn.ReLU(),
        "flat": torch.nn.Flatten(),
        "head": torch.nn.Linear(7200, 8),
    }
    return torch.nn.Sequential(OrderedDict(layers))  # ExecuTorch folds no BatchNorm named like a number


def load(what: str, mode: str, kind: str, which: str, folder: Path, network: str) -> Run:
    """Return a function that runs the file of one row."""
    import torch

    if what == "PyTorch":
        from benchmarks.networks import NETWORKS

        make = NETWORKS[network] if which == "whole" else _small
        if kind == "float":
            plain: Any = make().eval()
            plain.load_state_dict(torch.load(folder / f"{which}-float.pt", weights_only=True))
        else:
            from qat_lightning import load_quantized

            given = make() if mode == "eager" else None
            runtime: Any = "plain" if mode.endswith(_PLAIN) else None
            plain = load_quantized(folder / f"{which}-{_mode(mode)}.int8", network=given, runtime=runtime)
        return plain  # type: ignore[no-any-return]
    from qat_lightning.export import get_format

    form = get_format(what)
    run = form.load(folder / f"{which}-{what}-{kind}" / f"model{form.suffix}")
    return lambda images: run([images])


def worker(row: list[str], folder: Path, network: str) -> dict[str, int]:
    """Measure one file with one batch size."""
    import torch

    what, mode, kind, batch = row[0], row[1], row[2], int(row[3])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with torch.inference_mode():
        images = torch.randn(batch, 3, SIDE, SIDE)
        before = 0
        if row[4:] != ["whole"]:
            small = load(what, mode, kind, "small", folder, network)
            for _ in range(6):  # until kernels are recorded
                small(torch.randn(batch, 3, 32, 32))
            del small
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        run = load(what, mode, kind, "whole", folder, network)
        for _ in range(10):  # until frozen traces and plans exist
            run(images)
        loading = resident("VmHWM") - before
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(3):
            run(images)
    return {"loading": loading, "calls": resident("VmHWM") - before}


def ask(network: str, folder: Path, row: list[str]) -> dict[str, int] | str:
    """Return the measurements of a row's process, or why there are none."""
    environment = os.environ | {
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.inference_memory", network, str(folder), *row]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    if found:
        measured: dict[str, int] = json.loads(found[0].removeprefix("result "))
        return measured
    return (done.stderr.strip().splitlines() or ["no message"])[-1][:90]


def main(arguments: list[str]) -> None:
    """Measure and print a table for each network and batch size."""
    from rich.console import Console  # imported here because workers do not need it

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet18", "mobilenetv2"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rows", nargs="+", default=[*IN_PROCESS, *FILES], help="modes in PyTorch, and formats")
    parser.add_argument("--whole", action="store_true", help="of the whole process, with all that it imports")
    options = parser.parse_args(arguments)
    for network in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.inference_memory", network, folder, "build"]
            # Conversion need not compile; the format pt2 and the measuring process do.
            subprocess.run([*command, *options.rows], check=True, env=os.environ | {"QAT_LIGHTNING_COMPILE": "0"})
            for batch in options.batches:
                Console(width=120).print(_table(network, Path(folder), batch, options))


def _table(network: str, folder: Path, batch: int, options: argparse.Namespace) -> Table:
    from rich.table import Table

    whole = ", whole process" if options.whole else ""
    table = Table(title=f"{network}, batch {batch}, {SIDE}x{SIDE}{whole}", caption=describe())
    for column in ("runtime", "int8 from", "calls: float MB", "int8 MB", "times less", "loading: float MB", "int8 MB"):
        table.add_column(column, justify="left" if column in ("runtime", "int8 from") else "right")
    plain: dict[str, Any] = {}
    end = [str(batch), *(["whole"] if options.whole else [])]
    for what, mode in PAIRS:
        if (mode if what == "PyTorch" else what) not in options.rows:
            continue
        if what not in plain:
            plain[what] = ask(network, folder, [what, mode, "float", *end])
        float_, int8 = plain[what], ask(network, folder, [what, mode, "int8", *end])
        wrong = [found for found in (float_, int8) if isinstance(found, str)]
        if wrong:
            table.add_row(what, mode, wrong[0])
            continue
        assert not isinstance(float_, str)
        assert not isinstance(int8, str)
        calls, loading = [[found[key] / 1e6 for found in (float_, int8)] for key in ("calls", "loading")]
        table.add_row(
            what, mode, *(f"{x:.1f}" for x in calls), f"{calls[0] / calls[1]:.2f}", *(f"{x:.1f}" for x in loading)
        )
    return table


if __name__ == "__main__":
    network, folder, *row = sys.argv[1:]
    if row[0] == "build":
        build(network, Path(folder), row[1:])
    else:
        print("result", json.dumps(worker(row, Path(folder), network)), flush=True)
