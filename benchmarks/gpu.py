"""Tests and measurements on a machine with a GPU: ``make gpu``, or ``python -m benchmarks.gpu [--device cuda]``.

Four parts, each with a share of the time: the tests marked ``gpu``, the time of a training step, its memory, and ONNX
files in TensorRT. What cannot be measured, such as a tool that is not installed, is a row with the reason. One table is
printed, and written as Markdown and JSON. The exit status is 1 if a test failed or none was run.

With ``--device cpu`` the same program runs with tiny settings on the CPU, to check the program itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, qat_step
from benchmarks.machine import describe
from benchmarks.within import run_within

SHARES = {"tests": 0.36, "step": 0.34, "memory": 0.15, "TensorRT": 0.15}
"""The parts, and the share of the time for each."""

NETWORKS = ("resnet18", "mobilenetv2")
PEERS = ("torchao PT2E", "ModelOpt")
STEPS = ("fx", "pt2e", "eager", "fx, lsq", *PEERS)
KEPT = ("float", "fx", "pt2e", "eager", *PEERS)
COMPILED = ("float, compile", "fx, compile")

SIZES = {"cuda": {"batch": 128, "size": 128}, "cpu": {"batch": 2, "size": 32}}
"""Batch size, and height and width of the images in a training step."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        part: Its part.
        name: What was run.
        result: The result as text, or why there is none.
        figures: The result as numbers; empty if there is none.
        failed: Whether a test failed.
    """

    part: str
    name: str
    result: str
    figures: dict[str, Any] = field(default_factory=dict)
    failed: bool = False


class Clock:
    """Tells how much of a part's time is left.

    Args:
        seconds: Time limit of the part.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.monotonic()

    def left(self) -> float:
        """Return the seconds left, 0 or more."""
        return max(0.0, self.seconds - (time.monotonic() - self.began))


def tests(options: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """Run the tests marked ``gpu``; yield a summary row, and a row for each that failed or was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "--device", options.device]
        command += [*(["-k", options.tests] if options.tests else []), f"--junit-xml={report}", "tests/gpu"]
        try:
            done = run_within(command, clock.left())
        except subprocess.TimeoutExpired:
            yield Row("tests", "all", f"stopped after {clock.seconds:.0f} s", failed=True)
            return
        if not report.exists():
            yield Row("tests", "all", f"pytest did not run: {_last_line(done.stderr or done.stdout)}", failed=True)
            return
        cases = list(ElementTree.parse(report).iter("testcase"))
    yield from _counted(cases)


def _counted(cases: list[ElementTree.Element]) -> Iterator[Row]:
    outcomes = {case: _outcome(case) for case in cases}
    counts = {
        word: sum(outcome == word for outcome, _ in outcomes.values()) for word in ("passed", "failed", "skipped")
    }
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no test was collected"
    yield Row("tests", "all", said, counts, failed=counts["failed"] > 0 or counts["passed"] == 0)
    for case, (outcome, reason) in outcomes.items():
        if outcome != "passed":
            yield Row("tests", str(case.get("name")), f"{outcome}: {reason}", failed=outcome == "failed")


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return outcome, _one_line(found.get("message") or "")
    return "passed", ""


def step(options: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """Time training steps relative to float, in float32 and with autocast; compiled steps last."""
    for network, row, autocast in _steps(options):
        name = f"{network}, {row}{', bfloat16 autocast' if autocast else ''}"
        settings = _settings(options, network, rounds=options.rounds, warmup=4, autocast=autocast, clock="wall")
        found = _asked("benchmarks.qat_step", row, settings, clock)
        if isinstance(found, str):
            yield Row("step", name, f"not measured: {found}")
            continue
        ratios = [ours / plain for ours, plain in zip(found["row"], found["float"], strict=True)]
        figures = {
            "ms": statistics.median(found["row"]),
            "float_ms": statistics.median(found["float"]),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }
        yield Row(
            "step", name, "{ratio:.2f} times float ({least:.2f} to {most:.2f}), {ms:.1f} ms".format(**figures), figures
        )


def _steps(options: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    """Yield network, row, and whether to use autocast; the slowest last."""
    first = options.networks[0]
    yield from ((network, row, False) for network in options.networks for row in options.rows or STEPS)
    yield from ((first, row, True) for row in options.rows or ("fx", *PEERS))
    if not options.rows:
        yield from ((first, row, False) for row in COMPILED)


def kept(options: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """Measure the memory of training steps relative to float: the peak, and tensors saved for the backward pass."""
    for network in options.networks:
        plain: dict[str, Any] | None = None
        rows = ("float", *(row for row in options.rows or KEPT if row != "float"))
        for row in rows:
            name = f"{network}, {row}"
            found = _asked("benchmarks.memory", row, _settings(options, network), clock, memory.environment())
            if isinstance(found, str) or (plain is None and row != "float"):
                yield Row("memory", name, f"not measured: {found if isinstance(found, str) else 'float was not'}")
                continue
            plain = plain or found
            figures = {f"{key}_mb": found[key] / 1e6 for key in ("peak", "kept")}
            figures |= {f"{key}_ratio": found[key] / plain[key] for key in ("peak", "kept")}
            said = "peak {peak_mb:.0f} MB ({peak_ratio:.2f} times float), kept {kept_mb:.0f} MB ({kept_ratio:.2f})"
            yield Row("memory", name, said.format(**figures), figures)


def tensorrt(options: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """Compare ONNX files of backend ``tensorrt`` in TensorRT with the float network's."""
    for network in options.networks:
        if options.device != "cuda":
            yield Row("TensorRT", network, "not measured: TensorRT needs a GPU")
            continue
        command = [options.python, "-W", "ignore", "-m", "benchmarks.tensorrt", "--network", network]
        found = _result(command, clock)
        if isinstance(found, str):
            hint = " (pip install tensorrt)" if "No module named 'tensorrt'" in found else ""
            yield Row("TensorRT", network, f"not measured: {found}{hint}")
            continue
        said = "int8 {int8:.3f} ms, float {float:.3f} ms, int8 engine against the int8 network {sqnr_db:.1f} dB"
        yield Row("TensorRT", network, said.format(**found), found)


PARTS: dict[str, Callable[[argparse.Namespace, Clock], Iterator[Row]]] = {
    "tests": tests,
    "step": step,
    "memory": kept,
    "TensorRT": tensorrt,
}


def _settings(options: argparse.Namespace, network: str, **more: Any) -> argparse.Namespace:
    """Return the options for a worker of `benchmarks.qat_step` and `benchmarks.memory`."""
    shared = {"network": network, "device": options.device, "python": options.python, "threads": options.threads}
    return argparse.Namespace(**SIZES[options.device], **shared, **more)


def _asked(module: str, row: str, settings: argparse.Namespace, clock: Clock, environment: Any = None) -> Any:
    if clock.left() == 0:
        return f"the {clock.seconds:.0f} s of this part were over"
    return qat_step.ask_worker(module, row, settings, environment, clock.left())


def _result(command: list[str], clock: Clock) -> dict[str, Any] | str:
    """Return what a program prints after ``result``, or why it did not."""
    if clock.left() == 0:
        return f"the {clock.seconds:.0f} s of this part were over"
    try:
        done = run_within(command, clock.left())
    except subprocess.TimeoutExpired:
        return f"stopped after {clock.seconds:.0f} s"
    found = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    return json.loads(found[0].removeprefix("result ")) if found else _last_line(done.stderr)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _one_line(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _device(name: str) -> str:
    """Describe the GPUs, with driver and CUDA versions; or the CPU."""
    if name != "cuda":
        return "no GPU: a check of the program on the CPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"


def markdown(title: str, rows: list[Row]) -> str:
    """Format the table as Markdown."""
    lines = [title, "", "| part | what | result |", "|---|---|---|"]
    for row in rows:
        cells = (
            row.part,
            row.name,
            ("**" if row.failed else "") + _one_line(row.result) + ("**" if row.failed else ""),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--minutes", type=float, default=15.0, help="how long the whole may take")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--rows", nargs="+", choices=qat_step.ROWS, metavar="ROW", help=", ".join(qat_step.ROWS))
    parser.add_argument("--rounds", type=int, default=15, help="of the step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tests", help="only tests that this expression selects, as pytest's -k")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment with the peers")
    parser.add_argument("--out", default="gpu", help="where the table goes: OUT.md and OUT.json")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the parts, print and write the table.

    Returns:
        0, or 1 if a test failed or none was run, or 2 if there is no GPU.
    """
    options = _parser().parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} sees no CUDA device: install a CUDA build of torch, or check this program with "
            "--device cpu",
            file=sys.stderr,
        )
        return 2
    machine = f"{_device(options.device)}; {describe()}"
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for part in options.parts:
        began = time.monotonic()
        for row in PARTS[part](options, Clock(60 * options.minutes * SHARES[part])):
            rows.append(row)
            print(f"{row.part}: {row.name}: {_one_line(row.result)}", flush=True)
        seconds[part] = round(time.monotonic() - began, 1)
    took = ", ".join(f"{part} {value:.0f} s" for part, value in seconds.items())
    table = markdown(f"{machine}; {took}", rows)
    Path(f"{options.out}.md").write_text(table)
    found = {"machine": machine, "seconds": seconds, "rows": [asdict(row) for row in rows]}
    Path(f"{options.out}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{table}")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
