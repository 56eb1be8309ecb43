"""One trial: its identity, where it resumes, and the record of how it ended."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, open_dict

from qat_lightning.callbacks.median_pruning import why_pruned
from qat_lightning.errors import CombinationError
from qat_lightning.json_files import read_json, write_json
from qat_lightning.run import app
from qat_lightning.run.mistakes import explained
from qat_lightning.sweep.folder import is_grid
from qat_lightning.sweep.objective import check_objective, objective_of
from qat_lightning.sweep.process import run_apart
from qat_lightning.sweep.result import FILE, IDENTITY, TrialResult, identity, written
from qat_lightning.sweep.stopping import as_failure, interrupted, terminable
from qat_lightning.terminal import console

Train = Callable[[DictConfig], tuple[dict[str, float], app.Objects]]
Objective = float | tuple[float, ...] | None

OUTPUT = "output.log"

# Files in conf/hydra/launcher have the names of the plugins' own configurations. Hydra validates them against these,
# as intended, and warns about it in each process; every process of a sweep imports this module.
warnings.filterwarnings("ignore", message=r"\s*.*is validated against ConfigStore schema with the same name")


def run_trial(train: Train, cfg: DictConfig) -> Objective:
    """Run `train` once, as a single run or as a trial of a sweep, and record how it ended in ``result.json``.

    In a single run, a mistake in the configuration is shown in one panel and ends the program with 1. In a sweep
    nothing is raised, so that other trials continue: trials with incompatible settings are skipped, other errors are
    recorded, and a crashed process does not affect others. A trial's output goes to ``output.log`` in its folder.

    An interrupted trial resumes from its last checkpoint, as the same W&B run, when it is launched again in its folder:
    by a scheduler that requeues it, or with ``resume=true``. A finished trial is not changed. Early termination, such
    as by SIGTERM, is recorded as a failure with a nonzero exit status.

    Args:
        train: Takes the configuration; returns the metrics and the objects.
        cfg: The composed configuration of train.py.

    Returns:
        The metrics that ``objective=`` names, for a sweeper: a number, or a tuple of several. None without
        ``objective=``, for a trial without metrics, and for one that lacks a metric of the objective.
    """
    app.quiet()
    trial = Trial.current(cfg)
    if getattr(rank_zero_only, "rank", 0) > 0:
        with app.readable_errors():
            train(trial.joined(cfg))
        return None
    earlier = TrialResult.read(trial.folder)
    if not trial.of_sweep:
        if earlier is not None and earlier.done and trial.owns_folder:
            text = (
                f"{trial.folder} is {earlier.status}, so there is nothing to do. Another hydra.run.dir= starts a new "
                "one."
            )
            console().print(text, highlight=False)
            return _for_sweeper(earlier.objective)
        with app.readable_errors():
            return trial.attempt(train, cfg)
    if earlier is None or not earlier.done or not trial.owns_folder:
        earlier = trial.run(train, cfg)
    return _for_sweeper(earlier.objective)


@dataclass(frozen=True)
class Trial:
    """A folder and the run in it.

    Attributes:
        folder: Hydra's output folder.
        overrides: Hydra's overrides, without ``resume``.
        of_sweep: Whether it is part of a sweep.
        resume: Whether to continue the run in the folder.
    """

    folder: Path
    overrides: list[str]
    of_sweep: bool
    resume: bool

    @classmethod
    def current(cls, cfg: DictConfig) -> Trial:
        """Return the trial that Hydra is running."""
        hydra = HydraConfig.get()
        of_sweep = hydra.mode == RunMode.MULTIRUN
        # A trial of a sweep always resumes: the sweep refuses a folder with trials unless resume=true.
        return cls(
            Path(hydra.runtime.output_dir), identity(written(hydra.overrides.task)), of_sweep, of_sweep or cfg.resume
        )

    @property
    def owns_folder(self) -> bool:
        """Whether the folder's contents are from an earlier launch of this trial."""
        path = self.folder / IDENTITY
        return path.is_file() and read_json(path)["overrides"] == self.overrides

    def run(self, train: Train, cfg: DictConfig) -> TrialResult:
        """Run the trial as part of a sweep, in a separate process if possible."""
        began = time.monotonic()
        (self.folder / FILE).unlink(missing_ok=True)
        try:
            app.check(cfg)
            if not is_grid(HydraConfig.get().sweeper):
                check_objective(cfg)
        except CombinationError as error:
            TrialResult("skipped", self.overrides, error=explained(error)).write(self.folder)
        except Exception as error:
            logging.getLogger(__name__).exception("The configuration of this trial cannot be run.")
            TrialResult("failed", self.overrides, error=explained(error)).write(self.folder)
        else:
            died: str | None = "the sweep was ended, and the trial with it"
            try:
                with terminable():
                    died = run_apart(lambda: self._attempt_quietly(train, cfg), self.folder / OUTPUT, apart=cfg.isolate)
            finally:
                if not (self.folder / FILE).is_file():
                    why = {"type": "ProcessError", "message": died or "it ended without a result"}
                    seconds = time.monotonic() - began
                    TrialResult("failed", self.overrides, seconds=seconds, error=why).write(self.folder)
        result = TrialResult.read(self.folder)
        assert result is not None
        return result

    def attempt(self, train: Train, cfg: DictConfig) -> Objective:
        """Run `train` in this process, and record how it ended.

        Raises:
            BaseException: Any error of `train`, after it was recorded; an exit status of 0 is replaced by another.
        """
        began = time.monotonic()
        (self.folder / FILE).unlink(missing_ok=True)
        metrics: dict[str, float] = {}
        fit_metrics: dict[str, float] = {}
        wandb_run: dict[str, str] | None = None
        try:
            with terminable():
                metrics, run = train(self.begun(cfg))
                fit_metrics, wandb_run = run.fit_metrics, _wandb_run(run)
                pruned = why_pruned(run.callbacks)
                objective, lacking = objective_of(cfg, fit_metrics | metrics)
        except BaseException as error:
            ended = as_failure(error)
            seconds = time.monotonic() - began
            left = TrialResult("failed", self.overrides, metrics, fit_metrics, None, seconds, self._why(ended))
            left.write(self.folder)  # first, because the process may be killed soon
            wandb_run = wandb_run or _end_wandb()
            replace(left, wandb=wandb_run).write(self.folder)
            if ended is error:
                raise
            raise ended from error
        why = None
        if lacking:
            logging.getLogger(__name__).warning("%s", lacking)
            why = {"type": "NoObjective", "message": lacking}
        if pruned:
            why = {"type": "Pruned", "message": f"{pruned} {lacking}".strip()}
        TrialResult(
            "pruned" if pruned else "completed",
            self.overrides,
            metrics,
            fit_metrics,
            objective,
            time.monotonic() - began,
            why,
            wandb_run,
        ).write(self.folder)
        return _for_sweeper(objective)

    def _why(self, error: BaseException) -> dict[str, str]:
        """Return the reason for the end, and how to continue."""
        if isinstance(error, Exception):
            return explained(error)
        kind, message = type(error).__name__, str(error) or "it was ended"
        if interrupted(error):
            kind, message = "KeyboardInterrupt", "it was interrupted before it was done"
        elif type(error) is SystemExit:
            message = f"it ended with the status {error.code} before it was done"
        place = "hydra.sweep.dir" if self.of_sweep else "hydra.run.dir"
        folder = self.folder.parent if self.of_sweep else self.folder
        return {"type": kind, "message": f"{message}: the same command with {place}={folder} resume=true continues it."}

    def begun(self, cfg: DictConfig) -> DictConfig:
        """Return the configuration of this launch, with the id of its W&B run and the checkpoint to resume from."""
        goes_on = self.resume and self.owns_folder
        if self.of_sweep and not self.owns_folder:
            _put_aside(self.folder)
        begun: dict[str, Any] = read_json(self.folder / IDENTITY) if goes_on else {}
        # W&B's own sweep agents set the run's id; in a sweep of Hydra's, that id would be the same for all trials.
        agents = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ and not self.of_sweep else None
        run_id = cfg.run.id or agents or begun.get("wandb_id") or secrets.token_hex(4)
        last = self.folder / "checkpoints" / "last.ckpt"
        if not goes_on and last.is_file() and Path(cfg.ckpt_path or "").absolute() != last.absolute():
            last.replace(last.with_name("earlier.ckpt"))  # of another launch, from which this one must never resume
        checkpoint = cfg.ckpt_path or (str(last) if goes_on and last.is_file() else None)
        write_json(self.folder / IDENTITY, {"overrides": self.overrides, "wandb_id": run_id, "ckpt_path": checkpoint})
        group = cfg.run.group or (_sweep_name() if self.of_sweep else f"{cfg.data.name}-{cfg.model.name}")
        return _with(cfg, run_id, group, checkpoint)

    def joined(self, cfg: DictConfig) -> DictConfig:
        """Return the configuration that this trial's first process started with, for the other processes."""
        begun = read_json(self.folder / IDENTITY)
        return _with(cfg, begun["wandb_id"], cfg.run.group, begun["ckpt_path"])

    def _attempt_quietly(self, train: Train, cfg: DictConfig) -> bool:
        try:
            with app.readable_errors():
                self.attempt(train, cfg)
        except SystemExit:  # a mistake in the configuration, which was already shown
            return False
        except Exception:
            logging.getLogger(__name__).exception("The trial failed.")
            return False
        return True


def _sweep_name() -> str:
    """Return the last two parts of a sweep's folder, by default its date and time."""
    return "-".join(Path(str(HydraConfig.get().sweep.dir)).resolve().parts[-2:])


def _with(cfg: DictConfig, run_id: str, group: str | None, checkpoint: str | None) -> DictConfig:
    begun = cfg.copy()
    with open_dict(begun):
        begun.run.id = run_id
        begun.run.group = group
        begun.ckpt_path = checkpoint
    return begun


def _put_aside(folder: Path) -> None:
    """Move files of another trial into a separate folder, so that they are neither lost nor used."""
    left = [path for path in folder.iterdir() if path.name not in (".hydra", OUTPUT) and path.suffix != ".log"]
    if not any(path.name == IDENTITY for path in left):
        return
    number = 1 + len([path for path in left if path.name.startswith("earlier-")])
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for path in left:
        if not path.name.startswith("earlier-"):
            path.rename(aside / path.name)


def _for_sweeper(values: list[float] | None) -> Objective:
    if values is None:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _wandb_run(run: app.Objects) -> dict[str, str] | None:
    for logger in run.loggers:
        if isinstance(logger, WandbLogger):
            return {"id": str(logger.version), "dir": str(Path(logger.experiment.dir).parent)}
    return None


def _end_wandb() -> dict[str, str] | None:
    """Finish the W&B run of a failed trial, so that it is marked as failed and no other trial continues it."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return None
    found = {"id": str(wandb.run.id), "dir": str(Path(wandb.run.dir).parent)}
    wandb.finish(exit_code=1)
    return found
