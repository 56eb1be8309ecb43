"""Running commands with a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence


def run_within(
    command: Sequence[str], seconds: float | None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output.

    It runs in its own process group, and at the time limit the whole group is killed. Otherwise processes that it
    started, such as a compiler's, would keep its output open, and reading it would block.

    Args:
        command: The program and its arguments.
        seconds: Time limit; None for none.
        environment: Environment variables; by default those of this process.

    Raises:
        subprocess.TimeoutExpired: The time limit was reached.
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
        except BaseException:  # including KeyboardInterrupt
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
