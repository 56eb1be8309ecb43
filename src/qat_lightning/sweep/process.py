"""Running each trial in its own process, so that a crash does not affect others."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

DRAWING = threading.Lock()
"""Held by a thread that writes to the terminal, and while forking: a lock must not be copied while it is held."""

_GRACE = 10.0  # seconds for a trial to end by itself when the sweep is stopped
_OURS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # what schedulers send to the process that launched us


def run_apart(attempt: Callable[[], bool], output: Path, *, apart: bool) -> str | None:
    """Run a trial in a fork of this process, with its output in a file.

    A fork need not import everything again; it is safe as long as this process itself computes nothing, which holds for
    Hydra and its launchers. If a trial is killed, for lack of memory or by a crashing kernel, the launcher's process
    continues.

    Args:
        attempt: Runs the trial; returns whether it succeeded.
        output: File to which the trial's output is appended.
        apart: If False, run it in this process, without capturing its output.

    Returns:
        If the process died, a description of how; otherwise None.
    """
    ray = "ray" in sys.modules  # its workers have threads, which a fork would break, and are separate processes already
    if not apart or ray or "fork" not in multiprocessing.get_all_start_methods():
        attempt()
        return None
    process = multiprocessing.get_context("fork").Process(target=_trial, args=(attempt, output))
    with DRAWING:
        process.start()
    try:
        process.join()
    finally:  # the sweep was stopped, or preempted by its scheduler
        if process.is_alive():
            process.terminate()
            process.join(_GRACE)
            process.kill()
            process.join()
    code = process.exitcode
    if code is not None and code < 0:
        return f"it was killed by {signal.Signals(-code).name}" + (
            " (out of memory?)" if code == -signal.SIGKILL else ""
        )
    return f"it exited with {code}" if code else None


def _trial(attempt: Callable[[], bool], output: Path) -> None:
    for number in _OURS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Also if the launcher replaced stdout by an object of its own.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setStream(sys.stderr)
    sys.exit(0 if attempt() else 1)
