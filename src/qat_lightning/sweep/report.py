"""The Hydra callback of a sweep: checks before, progress during, and a table after it."""

from __future__ import annotations

import atexit
import importlib.util
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from qat_lightning.errors import MissingExtraError
from qat_lightning.json_files import read_json
from qat_lightning.run.mistakes import in_one_panel
from qat_lightning.sweep.claim import sweep_folder_of_its_own
from qat_lightning.sweep.folder import Plan, Standing, check_folder, check_trials, numbered, sweep_folder, varying
from qat_lightning.sweep.progress import SweepProgress
from qat_lightning.sweep.result import IDENTITY, TrialResult
from qat_lightning.sweep.stopping import terminable
from qat_lightning.terminal import LiteralTable, console

_STYLES = {
    "completed": "green",
    "pruned": "cyan",
    "skipped": "yellow",
    "failed": "red",
    "broken off": "red",
    "not started": "red",
}


class SweepReport(Callback):
    """Refuses a sweep that would overwrite another, shows its progress, and ends it with a table of its trials.

    The program exits with 1 if a trial failed or was interrupted. If the sweep itself is interrupted, by Ctrl-C or by a
    launcher that gives up, the table is shown as well.

    Goes into ``hydra.callbacks``; everything happens in the process that launches, whatever the launcher.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._folder: Path | None = None
        self._plan = Plan(None)
        self._began = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without state: launchers pickle the callback for their workers, which do not use it."""
        return {}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the planned trials, and start showing progress."""
        with in_one_panel():
            _require_plugins(config)
            self._plan = Plan.of(config)
            self._folder = sweep_folder_of_its_own(config, sweep_folder(config))
            check_folder(self._folder, self._plan, resume=config.resume)
            check_trials(config, self._plan, GlobalHydra.instance().config_loader())
        self._open.enter_context(terminable())
        self._began = self._open.enter_context(SweepProgress(self._folder, self._plan)).began
        atexit.register(self._end)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show the table.

        Raises:
            SystemExit: With 1, if a trial failed.
        """
        atexit.unregister(self._end)
        if not self._end():
            raise SystemExit(1)

    def _end(self) -> bool:
        """Show the table; returns whether all trials succeeded."""
        assert self._folder is not None
        self._open.close()
        standing = Standing.of(self._folder, self._began)
        words = _words(self._folder, self._plan)
        console().print(sweep_table(words, standing.results, self._folder))
        return not standing.failed and all(number in standing.results for number in words)


def sweep_table(trials: dict[int, list[str]], results: dict[int, TrialResult], folder: Path) -> Table:
    """A table of how each trial of a sweep ended, and why.

    Args:
        trials: Overrides of the trials, by number.
        results: Results of the trials that have one.
        folder: The sweep's folder, for the message on where to read more.

    Returns:
        A table for `rich.print`.

    Example:
        >>> done = TrialResult("completed", ["seed=0"], seconds=3.0)
        >>> sweep_table({0: ["seed=0"], 1: ["seed=1"]}, {0: done}, Path("multirun/mine")).row_count
        2
    """
    statuses = {number: _status(results.get(number), folder / str(number)) for number in trials}
    counts = ", ".join(f"{list(statuses.values()).count(s)} {s}" for s in _STYLES if s in statuses.values())
    ended_well = all(status in ("completed", "pruned", "skipped") for status in statuses.values())
    hint = (
        "" if ended_well else f"\nThe same command with hydra.sweep.dir={folder} resume=true runs only what is missing."
    )
    table = LiteralTable(title=f"{len(trials)} trials: {counts}" if trials else "No trials", caption_justify="left")
    table.caption = Text(f"{folder}{hint}")
    for column in ("trial", "settings", "ended", "objective"):
        table.add_column(column, justify="right" if column in ("trial", "objective") else "left")
    table.add_column("time", justify="right")
    table.add_column("why")
    for (number, status), words in zip(statuses.items(), varying(list(trials.values())), strict=True):
        result = results.get(number)
        objective = result.objective if result and result.objective else []
        table.add_row(
            str(number),
            Text(words),
            Text(status, style=_STYLES[status]),
            "\n".join(f"{value:.4g}" for value in objective),
            f"{result.seconds:.0f} s" if result and result.seconds else "",
            Text(_why(result, folder / str(number))),
        )
    return table


def _status(result: TrialResult | None, folder: Path) -> str:
    if result is not None:
        return result.status
    return "broken off" if folder.is_dir() else "not started"


def _why(result: TrialResult | None, folder: Path) -> str:
    printed = folder / "output.log"
    see = f"see {printed}" if printed.is_file() else ""
    if result is None:
        return f"no result: {see}" if see else ""
    if result.error is None:
        return ""
    message = result.error["message"]
    if result.status != "failed":
        return message
    return "\n".join(filter(None, (f"{result.error['type']}: {message}", see)))


def _words(folder: Path, plan: Plan) -> dict[int, list[str]]:
    """The overrides of every trial: from the plan, otherwise from the trials' folders."""
    if plan.trials:
        return {number: list(trial) for number, trial in enumerate(plan.trials)}
    found: dict[int, list[str]] = {}
    for number, trial in numbered(folder):
        result = TrialResult.read(trial)
        if result is not None:
            found[number] = result.overrides
        elif (trial / IDENTITY).is_file():
            found[number] = read_json(trial / IDENTITY)["overrides"]
    return found


def _require_plugins(config: DictConfig) -> None:
    """Check that plugins are installed, because Hydra's own error does not say how to install them."""
    for key in ("launcher", "sweeper"):
        target = str(config.hydra[key]._target_)
        try:
            found = importlib.util.find_spec(target.rpartition(".")[0]) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            extra = "ray" if "ray" in target else "sweeps"
            raise MissingExtraError(
                f"hydra/{key} needs the package {target.split('.')[1].replace('_', '-')}: "
                f"pip install 'qat-lightning[{extra}]'."
            )
