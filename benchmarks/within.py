"""Commands that may not take longer than they are given."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence


def run_within(
    command: Sequence[str], seconds: float | None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command and read what it prints.

    It runs in a process group of its own, and after its time the whole group is killed: processes that it started,
    such as a compiler's, would keep its output open, and reading would wait for them.

    Args:
        command: The program and its arguments.
        seconds: How long it may take; None for no limit.
        environment: Its variables; by default those of this process.

    Raises:
        subprocess.TimeoutExpired: It took longer.
    """
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=None if environment is None else dict(environment),
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException:  # also when this program is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
