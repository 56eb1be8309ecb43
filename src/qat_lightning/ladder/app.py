"""``method=auto`` of train.py: trains the float network and searches from it; each rung is a run, all in one group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf, open_dict

from qat_lightning.callbacks.parts.checkpoint_io import read_float_state
from qat_lightning.callbacks.parts.find_networks import find_networks
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.compare.ladder import FOLDER
from qat_lightning.compare.settings import flatten
from qat_lightning.errors import CombinationError
from qat_lightning.ladder.reached import Reached
from qat_lightning.ladder.search import reach, without_banners
from qat_lightning.ladder.target import Target
from qat_lightning.run import app
from qat_lightning.run.metric import ModelMetric
from qat_lightning.storage import place
from qat_lightning.sweep.baseline import with_baseline
from qat_lightning.whole_files import write_whole

AUTO = "auto"
"""The name of the method."""

_OF_THE_START = (
    "mode", "kind", "module", "calibration_batches", "on_fault", "equalization", "smoothquant", "rotation",
    "bias_correction",
)  # fmt: skip
_NOT_ON_A_LADDER = {
    "calibration_dataloader": None,
    "calls": None,
    "adaround": None,
    "sequential_mse": False,
    "rehearse": True,
}
_CHOSEN_BY_ITSELF = ("distillation", "batchnorm_reestimation")


def climb(cfg: DictConfig) -> tuple[dict[str, float], app.Objects]:
    """Train the float network unless there is one, and search for the int8 network that meets the target.

    Args:
        cfg: The composed configuration of train.py with ``method=auto``.

    Returns:
        The metrics of the final test, and the objects of the run.

    Raises:
        ConfigurationError: The target or another setting is invalid. Raised before anything is trained.
    """
    target = Target(**OmegaConf.to_container(cfg.target, resolve=True))  # type: ignore[arg-type]
    _check(cfg)
    fine = OmegaConf.merge(cfg, cfg.ladder.training)
    model: LightningModule = instantiate(fine.model.module)
    networks = [Slot(model, name).get() for name in find_networks(model, cfg.quantization.module)]
    target.check_size(sum(parameter.numel() for network in networks for parameter in network.parameters()))
    checkpoint = _float_checkpoint(cfg)
    model.load_state_dict(read_float_state(place(checkpoint)))
    datamodule = instantiate(cfg.data.datamodule)
    runs = _Runs(cfg)
    trainers = _Trainers(cfg)
    folder = Path(cfg.paths.output_dir) / FOLDER
    part = cfg.quantization
    start = {key: part[key] for key in _OF_THE_START}
    ladder = {key: cfg.ladder[key] for key in cfg.ladder if key not in ("training", "files", "larger_is_better")}
    found = reach(
        trainers,
        model,
        datamodule,
        target,
        folder=folder,
        resume=True,  # whether the run's folder may exist is checked elsewhere
        backend=part.backend,
        scheme=instantiate(part.scheme),
        include=tuple(part.include or ()),
        exclude=tuple(part.exclude or ()),
        example_inputs=instantiate(part.example_inputs),
        files=list(cfg.ladder.files),
        loggers=runs,
        seed=cfg.seed,
        larger_is_better=_larger_is_better(cfg),
        **start,
        **ladder,
    )
    _keep(cfg, found)
    with without_banners():
        trainer = trainers(callbacks=[], logger=False)
    objects = app.Objects(trainer, model, datamodule, [], runs.of_test, {})
    if found.best is not None:
        int8 = {
            key.removeprefix("int8/"): value for key, value in found.best.metrics.items() if key.startswith("int8/")
        }
        objects.fit_metrics.update(int8)
    return dict(found.metrics), objects


def _check(cfg: DictConfig) -> None:
    """Refuse settings that the search chooses itself."""
    if formats := list(cfg.get("export_formats") or {}):
        raise CombinationError(
            f"export={','.join(formats)} cannot be combined with method=auto, which chooses the file itself: use "
            f"ladder.files=[{','.join(formats)}]."
        )
    if named := [name for name in _CHOSEN_BY_ITSELF if (cfg.get("callbacks") or {}).get(name) is not None]:
        raise CombinationError(
            f"recipe={named[0]} cannot be combined with method=auto, which chooses recipes itself: leave it out."
        )
    if others := [key for key, usual in _NOT_ON_A_LADDER.items() if cfg.quantization[key] != usual]:
        raise CombinationError(
            f"quantization.{others[0]}={cfg.quantization[others[0]]} cannot be combined with method=auto: leave it "
            "out, or use method=ptq."
        )
    of_training = OmegaConf.to_container(cfg.ladder.training)
    others = [key for key in flatten(of_training) if not key.startswith("model.module.")]  # type: ignore[arg-type]
    if others:
        raise CombinationError(
            f"ladder.training.{others[0]} has no effect: the short and long trainings have settings of their own for "
            f"ladder.training.model.module only. Give {others[0]}= for all trainings."
        )
    if not isinstance(place(str(cfg.paths.output_dir)), Path):
        raise CombinationError(
            f"The search cannot be stored at {cfg.paths.output_dir}: give hydra.run.dir=<a local folder> with "
            "method=auto."
        )
    if OmegaConf.is_config(cfg.quantization.backend):
        raise CombinationError(
            "A quantizer given as a mapping cannot be combined with method=auto: give "
            "backend.quantizer=package.module.Class."
        )


def _larger_is_better(cfg: DictConfig) -> bool | None:
    """Whether larger values of the metric are better; None if its name decides."""
    own = ModelMetric.of(cfg)
    if cfg.ladder.larger_is_better is None and own is not None and cfg.ladder.metric == own.logged("val"):
        return own.larger_is_better
    given: bool | None = cfg.ladder.larger_is_better
    return given


def _float_checkpoint(cfg: DictConfig) -> str:
    """The checkpoint of the float run, which is trained first if it does not exist."""
    if cfg.float_checkpoint is not None:
        return str(cfg.float_checkpoint)
    shared = cfg.copy()
    with open_dict(shared):
        shared.baseline.use = "compare" if shared.baseline.use == "none" else shared.baseline.use
    return str(with_baseline(shared).float_checkpoint)


class _Trainers:
    """Creates the Trainer of a rung from the configuration."""

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg

    def __call__(self, **settings: Any) -> Trainer:
        callbacks = list(settings.pop("callbacks"))
        bar = (self._cfg.get("callbacks") or {}).get("rich_progress_bar")
        if bar is not None and settings.get("enable_progress_bar", True):
            callbacks.append(instantiate(bar))
        made = {"enable_progress_bar": bar is not None, "plugins": app.plugins(), **settings}
        trainer: Trainer = instantiate(self._cfg.trainer, _partial_=True)(callbacks=callbacks, **made)
        return trainer


class _Runs:
    """Creates the loggers of a rung: each rung is a run of its own, in one group with the run of the search."""

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self.of_test: list[Logger] = []

    def __call__(self, rung: str) -> Sequence[Logger]:
        cfg = self._cfg.copy()
        with open_dict(cfg):
            cfg.run.group = f"{cfg.run.group}-{cfg.run.id}"
            if rung != "test":
                cfg.run.name, cfg.run.id, cfg.run.job_type = f"{cfg.run.name}-{rung}", f"{cfg.run.id}-{rung}", "rung"
                cfg.paths.output_dir = str(Path(cfg.paths.output_dir) / FOLDER / "rungs" / rung)
                Path(cfg.paths.output_dir).mkdir(parents=True, exist_ok=True)
        loggers = app.make_loggers(cfg)
        if rung == "test":
            self.of_test = loggers
            app.log_configuration(cfg, loggers)
        return loggers


def _keep(cfg: DictConfig, found: Reached) -> None:
    """Copy the chosen int8 network to where every method saves it."""
    if cfg.save_int8 and found.best is not None:
        chosen = found.network_file
        write_whole(Path(cfg.paths.output_dir) / app.INT8_FILE, chosen.read_bytes())
