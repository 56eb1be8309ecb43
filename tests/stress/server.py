"""Fits that are killed: a process that forks one child for each, and its client.

Importing torch, torchao and Lightning takes seconds and a fit of twelve steps takes one, so imports are done once. A
child is still a real process: it has its own memory and files, nothing of the fit existed before the fork (no network,
no Trainer, no random state, no thread), it gets a SIGKILL that it cannot catch or clean up after, and the process that
resumes it knows only the files that it left.
"""

from __future__ import annotations

import dataclasses
import faulthandler
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IDLE = 120.0
"""Seconds in which a child that uses the processor for less than one of them is taken to hang. Time on the wall says
little by itself: on a machine that is busy with other things a child gets on slowly, but it gets on."""
WORK = 900.0
"""Seconds on the processor after which a child is taken to go round in circles."""
_LOOK = 2.0


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        status: ``"killed"``, ``"ended"``, ``"failed"`` (with a traceback in its log) or ``"hung"`` (with its stack at
            the end of the log).
        where: The part in which it ended.
        parts: All its parts, with the second at which each began.
        seconds: Time from fork to end.
    """

    status: str
    where: str
    parts: list[tuple[str, float]]
    seconds: float


class Server:
    """Starts the process that forks; a context manager.

    Args:
        idle: See `IDLE`.

    Example:
        >>> from tests.stress.worker import Run  # doctest: +SKIP
        >>> with Server() as server:  # doctest: +SKIP
        ...     server.run(Run("fx", folder))
    """

    def __init__(self, idle: float = IDLE) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "QAT_LIGHTNING_COMPILE": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.server", str(idle)],
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


def serve(idle: float) -> None:
    """Read runs from standard input, one per line, and write their outcomes."""
    import torch

    # Everything that a fit imports, so that a child need not.
    for name in ("modes.eager.mode", "modes.fx.mode", "modes.pt2e.mode"):
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
        answers.write(json.dumps(dataclasses.asdict(_fork(json.loads(line), idle))) + "\n")
        answers.flush()


def _fork(request: dict[str, Any], idle: float) -> Outcome:
    from tests.stress.worker import Kill, Run

    run = Run(**request | {"kill": Kill(**request["kill"]) if request["kill"] else None})
    began = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(run, writing)
    os.close(writing)
    parts, status, hung = _watch(run, _Child(pid, idle), reading, began)
    os.close(reading)
    if hung:
        how = "hung"
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        how = "killed"
    else:
        how = "ended" if status == 0 else "failed"
    return Outcome(how, parts[-1][0] if parts else "", parts, time.monotonic() - began)


@dataclass
class _Child:
    """A child, and when it last made progress."""

    pid: int
    idle: float
    worked: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def hangs(self) -> bool:
        now, used = time.monotonic(), _processor_seconds(self.pid)
        if used >= self.worked + 1.0:
            self.worked, self.since = used, now
        return now - self.since > self.idle or used > WORK

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def kill_with_a_word(self) -> None:
        """Make it write its stack to its log, even from C code."""
        os.kill(self.pid, signal.SIGUSR1)
        time.sleep(1.0)
        self.kill()

    def ended(self) -> int | None:
        """How it ended, if it has."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return status if pid else None


def _processor_seconds(pid: int) -> float:
    """The CPU time of all threads of a process; without /proc the wall-clock time."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _watch(run: Any, child: _Child, reading: int, began: float) -> tuple[list[tuple[str, float]], int, bool]:
    """Record the parts of a child until it ends; kill it from outside if requested or if it hangs.

    Its end is also polled, because a child process of its own might keep the pipe open.
    """
    parts: list[tuple[str, float]] = []
    kill = run.kill if run.kill is not None and run.kill.seconds is not None else None
    killing, hung, rest = None, False, b""
    while True:
        pause = _LOOK if killing is None else min(_LOOK, max(0.0, killing - time.monotonic()))
        ready, _, _ = select.select([reading], [], [], pause)
        now = time.monotonic()
        read = os.read(reading, 65536) if ready else b""
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            parts.append((line.decode(), now - began))
            if kill is not None and line.decode() == f"{kill.part} {kill.at}":
                killing, kill = now + kill.seconds, None
        if read:
            continue
        status = child.ended()
        if status is not None:
            return parts, status, hung
        if killing is not None and now >= killing:
            child.kill()
            killing = None
        elif not hung and child.hangs():
            hung = True
            child.kill_with_a_word()
        elif ready:
            time.sleep(0.01)  # the pipe is closed, and the process about to end


def _child(run: Any, writing: int) -> None:
    from tests.stress.worker import fit, output_to

    code = 1
    tempfile.tempdir = run.temporary
    warnings.simplefilter("ignore")
    try:
        with output_to(Path(run.folder) / "log.txt"):
            faulthandler.register(signal.SIGUSR1, file=2)
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
    serve(float(sys.argv[1]))
