"""A process of its own for each trial, so that one that dies takes nothing else with it."""

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
"""Held by a thread that writes to the terminal, and while forking: a lock must not be copied while it is taken."""

_GRACE = 10.0  # seconds for a trial to end by itself when the sweep is stopped
_OURS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # what schedulers send to the process that launched us


def run_apart(attempt: Callable[[], bool], output: Path, *, apart: bool) -> str | None:
    """Run a trial in a fork of this process, with what it prints in a file.

    A fork, because it need not import everything again; it is sound as long as this process computes nothing itself,
    which holds for Hydra and its launchers. A trial that is killed, for want of memory or by a kernel that crashes,
    then ends by itself, and the launcher's own process stays.

    Args:
        attempt: Runs the trial; returns whether it went well.
        output: File that gets what the trial prints, behind what is there.
        apart: If False, run it in this process, and let it print.

    Returns:
        What became of the process, in words, if it died; else None.
    """
    ray = "ray" in sys.modules  # its workers have threads, which a fork would break, and are processes of their own
    if not apart or ray or "fork" not in multiprocessing.get_all_start_methods():
        attempt()
        return None
    process = multiprocessing.get_context("fork").Process(target=_trial, args=(attempt, output))
    with DRAWING:
        process.start()
    try:
        process.join()
    finally:  # the sweep was stopped, or its scheduler takes the machine away
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
    # Also where the launcher put objects of its own in the place of stdout.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setStream(sys.stderr)
    sys.exit(0 if attempt() else 1)
