"""Fits that are killed: a warm process that forks one child for each, and the client that asks it to.

Importing torch, torchao and Lightning takes seconds and a fit of twelve steps takes one, so the imports are done once.
A child is a real process all the same: it has its own memory and its own files, nothing of the fit existed when it was
forked (no network, no Trainer, no random state, no thread), it gets a SIGKILL from the kernel that it can neither catch
nor clean up after, and whoever resumes is another process that knows nothing but the files it left.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        status: ``"killed"``, ``"ended"``, ``"failed"`` (by itself, with a traceback in its log) or ``"hung"``.
        where: The part in which it was at the end.
        parts: All parts it went through, with the second at which each began.
        seconds: From fork to end.
    """

    status: str
    where: str
    parts: list[tuple[str, float]]
    seconds: float


class Server:
    """Starts the warm process; a context manager.

    Example:
        >>> from tests.stress.worker import Run  # doctest: +SKIP
        >>> with Server() as server:  # doctest: +SKIP
        ...     server.run(Run("fx", folder))
    """

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "QAT_LIGHTNING_COMPILE": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, run: Any) -> Outcome:
        """Fork a child for a `Run`, and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(run)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the warm process ended with {self._process.wait()}")
        return Outcome(**json.loads(answer))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def serve() -> None:
    """Read runs from the input, one a line, and write their outcomes."""
    import torch

    # Everything that a fit imports, so that a child need not.
    for name in ("flows.eager", "flows.fx", "flows.pt2e"):
        importlib.import_module(f"qat_lightning.{name}")
    importlib.import_module("tests.stress.worker")

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        threads = len(list(Path("/proc/self/task").iterdir())) if Path("/proc/self/task").exists() else 1
        if threads != 1:
            raise RuntimeError(f"{threads} threads: only a process of one can be forked safely")
        answers.write(json.dumps(dataclasses.asdict(_fork(json.loads(line)))) + "\n")
        answers.flush()


def _fork(request: dict[str, Any]) -> Outcome:
    from tests.stress.worker import Kill, Run

    run = Run(**request | {"kill": Kill(**request["kill"]) if request["kill"] else None})
    began = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(run, writing)
    os.close(writing)
    parts, hung = _watch(run, pid, reading, began)
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if hung:
        how = "hung"
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        how = "killed"
    else:
        how = "ended" if status == 0 else "failed"
    return Outcome(how, parts[-1][0] if parts else "", parts, time.monotonic() - began)


def _watch(run: Any, pid: int, reading: int, began: float) -> tuple[list[tuple[str, float]], bool]:
    """Note the parts of a child until it ends, and kill it from outside where that is to be done."""
    parts: list[tuple[str, float]] = []
    kill = run.kill if run.kill is not None and run.kill.calls is None else None
    deadline, killing, hung, rest = began + TIMEOUT, None, False, b""
    while True:
        until = deadline if killing is None else min(deadline, killing)
        ready, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
        now = time.monotonic()
        if not ready:
            hung = hung or killing is None
            killing, deadline = None, now + TIMEOUT
            os.kill(pid, signal.SIGKILL)
            continue
        read = os.read(reading, 65536)
        if not read:
            return parts, hung
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            parts.append((line.decode(), now - began))
            if kill is not None and line.decode() == f"{kill.part} {kill.at}":
                killing, kill = now + kill.seconds, None


def _child(run: Any, writing: int) -> None:
    from tests.stress.worker import fit, output_to

    code = 1
    tempfile.tempdir = run.temporary
    warnings.simplefilter("ignore")
    try:
        with output_to(Path(run.folder) / "log.txt"):
            try:
                fit(run, lambda part: os.write(writing, f"{part}\n".encode()))
                code = 0
            except BaseException:  # noqa: BLE001 - it goes into the log, and the exit code says so
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
