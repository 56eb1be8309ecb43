"""The smallest network of each timm family, trained, converted, saved and loaded: ``python -m benchmarks.zoo``.

Use a separate environment, since a torchvision that was built for another torch breaks ``import lightning``; its two
ops are declared here before it is imported:

    python -m venv zoo && zoo/bin/pip install -r requirements.lock && zoo/bin/pip install --no-deps -e .
    zoo/bin/pip install --no-deps timm==1.0.31 torchvision==0.29.1 safetensors huggingface_hub
    OMP_NUM_THREADS=1 zoo/bin/python -m benchmarks.zoo --results zoo.jsonl
    zoo/bin/python -m benchmarks.zoo --results zoo.jsonl --report > table.md

Each network is trained for two steps on two random images by a Trainer with ``QuantizationAwareTraining(mode="auto")``,
converted, verified, saved, loaded and compared. Each has its own process with a time limit, forked from one that has
imported everything. Its result is written when it ends; an interrupted run continues where it stopped. Output of a
network is stored in a folder beside the results. Mode pt2e runs its decomposed graph uncompiled, unless the environment
has ``QAT_LIGHTNING_COMPILE=1``.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from pathlib import Path
from typing import Any

# Before torch is imported: a process can only be forked while it has a single thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.zoo.networks import declare_torchvision_ops, smallest_of
from benchmarks.zoo.report import table
from benchmarks.zoo.server import apart

PEERS = ("upstream fx", "upstream pt2e")


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def _networks(path: Path) -> dict[str, tuple[str, int]]:
    """Return the smallest network of each family, from the results if available."""
    import timm

    found = {row["smallest of"]: (row["network"], row["parameters"]) for row in _read(path) if "smallest of" in row}
    for family in timm.list_modules():
        if family not in found:
            smallest = smallest_of(family)
            found[family] = (smallest.name, smallest.parameters)
            row = {"smallest of": family, "network": smallest.name, "parameters": smallest.parameters}
            _append(path, row | {"timm": timm.__version__})
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--results", type=Path, default=Path("zoo.jsonl"), help="a line for each network is added")
    parser.add_argument("--modes", nargs="*", default=["auto"], choices=["auto", "fx", "pt2e", "eager"])
    parser.add_argument("--peers", action="store_true", help="bare upstream FX and PT2E as well")
    parser.add_argument("--families", nargs="+", help="by default all")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th family, from the I-th (from 0)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a network")
    parser.add_argument("--small", action="store_true", help="inputs of 96x96 where the network admits it")
    parser.add_argument("--again", action="store_true", help="run what has a line already; the last line counts")
    parser.add_argument("--report", action="store_true", help="print the table of what there is, and run nothing")
    return parser.parse_args()


def main() -> None:
    """Run networks without a result, or print the table."""
    options = _arguments()
    declare_torchvision_ops()
    networks = _networks(options.results)
    families = options.families or sorted(networks)
    smallest_first = sorted(families, key=lambda family: networks[family][1])
    rows = [row for row in _read(options.results) if "family" in row]
    if options.report:
        print(table(rows, families, options.modes, PEERS if options.peers else ()))
        return
    index, count = map(int, options.shard.split("/"))
    from benchmarks.machine import describe
    from benchmarks.zoo import flow

    logs = options.results.with_suffix(".logs")
    logs.mkdir(parents=True, exist_ok=True)
    assert threading.active_count() == 1, "a process with threads is not forked safely"
    there = {(row["family"], row["mode"]) for row in rows} if not options.again else set()
    for family in smallest_first[index::count]:
        name, parameters = networks[family]
        for mode in [*options.modes, *(PEERS if options.peers else ())]:
            if (family, mode) in there:
                continue
            log = logs / f"{family}.{mode.replace(' ', '_')}.txt"
            noted = apart(lambda note, n=name, m=mode: flow.run(n, m, options.small, note), options.limit, log)
            row = {"family": family, "mode": mode, "network": name, "parameters": parameters, "small": options.small}
            _append(options.results, row | noted | {"machine": describe()})
            shown = {key: noted.get(key) for key in ("stage", "took", "share", "seconds", "error")}
            print(family, mode, name, json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
