"""Each network in a process with a time limit, forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def apart(work: Callable[[Callable[..., None]], None], limit: float, log: Path) -> dict[str, Any]:
    """Run a function in a forked process, and return what it recorded, however it ended.

    Args:
        work: The function; it gets a function that records keyword arguments.
        limit: Time limit in seconds, after which the process is killed.
        log: File for the output of the process, and for its stack at the time limit.

    Returns:
        What was recorded, with ``seconds`` and, in case of failure, ``error``.
    """
    began = time.monotonic()
    handle, path = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _in_child(work, Path(path), log)
    try:
        status = _wait(child, began + limit)
        noted: dict[str, Any] = json.loads(Path(path).read_text() or "{}")
    finally:
        Path(path).unlink(missing_ok=True)
    if status is None:
        noted["error"] = f"stopped after {limit:.0f} s"
    elif status != 0 and "error" not in noted:
        noted["error"] = f"the process ended with status {os.waitstatus_to_exitcode(status)}"
    return noted | {"seconds": round(time.monotonic() - began, 1)}


def _wait(child: int, until: float) -> int | None:
    """Return the child's status; None if it had to be killed with its own child processes."""
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGUSR1)  # writes its stack to the log
        time.sleep(0.5)
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _in_child(work: Callable[[Callable[..., None]], None], path: Path, log: Path) -> None:
    noted: dict[str, Any] = {}

    def note(**more: Any) -> None:
        noted.update(more)
        whole = path.with_suffix(".whole")
        whole.write_text(json.dumps(noted))
        whole.replace(path)

    code = 1
    try:
        os.setpgid(0, 0)
        with contextlib.suppress(AttributeError, OSError):  # on Linux, let it die with its parent
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
            try:
                work(note)
            except BaseException:
                traceback.print_exc()
                raise
            code = 0
    except BaseException as error:  # noqa: BLE001 - any failure is this network's result
        note(error=f"{type(error).__name__}: {error}"[:2000])
    finally:
        os._exit(code)
