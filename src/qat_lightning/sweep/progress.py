"""Progress of a running sweep: a bar on a terminal, otherwise a line for each change."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qat_lightning.sweep.folder import Plan, Standing
from qat_lightning.sweep.process import DRAWING

_INTERVAL = 1.0  # seconds between two checks of the folder


class SweepProgress:
    """Watches a sweep's folder from a thread, and shows trials done, running and failed, and the time left.

    Args:
        folder: The sweep's folder.
        plan: The trials that will run in it.
        console: The console to print to; by default stderr.
    """

    def __init__(self, folder: Path, plan: Plan, console: Console | None = None) -> None:
        self.began = time.time()
        self._folder = folder
        self._plan = plan
        self._console = console or Console(stderr=True)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sweep progress", daemon=True)
        self._said = ""
        self._bar = Progress(
            TextColumn("sweep"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("sweep", total=plan.total, words="")

    def __enter__(self) -> SweepProgress:
        if self._console.is_terminal:
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._console.is_terminal:
            self._bar.stop()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            standing = Standing.of(self._folder, self.began)
            words = self._words(standing)
            with DRAWING:
                if self._console.is_terminal:
                    self._bar.update(self._task, completed=len(standing.results), words=words, refresh=True)
                elif self._counts(standing) != self._said:
                    self._said = self._counts(standing)
                    total = "" if self._plan.total is None else f" of {self._plan.total}"
                    self._console.print(f"sweep: {len(standing.results)}{total} done, {words}", soft_wrap=True)

    def _counts(self, standing: Standing) -> str:
        return f"{len(standing.results)} {len(standing.running)} {standing.failed}"

    def _words(self, standing: Standing) -> str:
        words = [f"{len(standing.running)} running", f"{standing.failed} failed"]
        left = time_left(time.time() - self.began, len(standing.fresh), len(standing.results), self._plan.total)
        return ", ".join([*words, f"about {left} left"] if left is not None else words)


def time_left(elapsed: float, fresh: int, done: int, total: int | None) -> timedelta | None:
    """Estimate the remaining time from the time per trial so far.

    Args:
        elapsed: Seconds since this launch began.
        fresh: Number of trials run in this launch.
        done: Number of trials that need not run any more, including those of earlier launches and skipped ones.
        total: Total number of trials.

    Returns:
        The time, in whole seconds; None if it cannot be estimated yet.

    Example:
        >>> str(time_left(60.0, fresh=3, done=4, total=12))
        '0:02:40'
    """
    if not fresh or total is None:
        return None
    return timedelta(seconds=round(elapsed / fresh * (total - done)))
