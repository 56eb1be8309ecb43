"""The parts of train.py: checking a configuration, building its objects, and showing mistakes in it in one panel."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf, open_dict

from qat_lightning.callbacks.parts.checkpoint_io import WholeFileCheckpointIO
from qat_lightning.callbacks.parts.fit_metrics import FitMetrics
from qat_lightning.callbacks.quantization_callback import QuantizationCallback
from qat_lightning.errors import ArtifactError, CombinationError, ConfigurationError
from qat_lightning.export.formats import check_formats
from qat_lightning.measure.wandb_views import define_summaries, log_int8
from qat_lightning.run.mistakes import in_one_panel
from qat_lightning.settings.backends import get_backend, require
from qat_lightning.settings.quantizers import backend_and_source
from qat_lightning.settings.recipe import Recipe
from qat_lightning.storage import is_file, join, place, require_storage

INT8_FILE = "model.int8"
"""Name of the int8 network's file in the folder of a run."""


class Objects(NamedTuple):
    """The objects of a run."""

    trainer: Trainer
    model: LightningModule
    datamodule: LightningDataModule
    callbacks: list[Callback]
    loggers: list[Logger]
    fit_metrics: dict[str, float]  # the metrics logged at the end of the fit


def check(cfg: DictConfig) -> None:
    """Check a configuration before anything is built or trained.

    Args:
        cfg: The composed configuration of train.py.

    Raises:
        ConfigurationError: A value is missing, or a file does not exist.
        CombinationError: Settings are incompatible, such as a mode and a backend.
        MissingExtraError: The backend needs a package that is not installed.
    """
    if missing := list(_missing(cfg)):
        raise ConfigurationError(f"Values are missing: give {' '.join(f'{key}=...' for key in missing)}")
    _check_labels(cfg)
    quantization = cfg.get("quantization")
    if quantization is not None and list(quantization) == ["scheme"]:
        raise CombinationError(
            f"scheme= needs quantization, and method={cfg.method.name} does not quantize: leave it out, or choose "
            "method=qat or method=ptq."
        )
    if quantization is not None:
        require(get_backend(backend_and_source(quantization.backend)[0], quantization.mode))
        if OmegaConf.select(cfg, "model.fused"):
            raise CombinationError(
                f"model.fused=true measures a float network with BatchNorm folded, and method={cfg.method.name} "
                "folds it by itself: leave it out, or choose method=float."
            )
    elif cfg.method.get("continues"):
        if cfg.baseline.use != "start":
            raise CombinationError(
                f"method={cfg.method.name} continues the training of a float run: add baseline=start, which trains "
                "that run first if it does not exist yet."
            )
    elif cfg.float_checkpoint is not None:
        raise CombinationError(
            f"float_checkpoint={cfg.float_checkpoint} is what an int8 network is compared with, and "
            f"method={cfg.method.name} creates none: leave it out, or choose method=qat."
        )
    _check_export(cfg)
    require_storage(cfg.paths.output_dir)
    for key in ("ckpt_path", "float_checkpoint"):
        if cfg[key] is not None and not _is_file(key, cfg[key]):
            raise ConfigurationError(
                f"{key}={cfg[key]} does not exist. Expected a checkpoint of Lightning, as train.py leaves them in "
                "outputs/<date>/<time>/checkpoints/last.ckpt"
            )


def _check_labels(cfg: DictConfig) -> None:
    """Reject data of another task than the model's; data that does not state its labels is not checked."""
    learned, given = (OmegaConf.select(cfg, f"{part}.labels") for part in ("model", "data"))
    if learned is not None and given is not None and learned != given:
        raise CombinationError(
            f"model={cfg.model.name} learns a label for each {learned}, and data={cfg.data.name} has one for each "
            f"{given}: choose another data= or model= (docs/tasks.md), or for a network of your own "
            f"model.labels={given}."
        )


def _is_file(key: str, path: str) -> bool:
    try:
        return is_file(place(path))
    except OSError as error:
        raise ConfigurationError(f"{key}={path} cannot be accessed: {error}") from error


def _check_export(cfg: DictConfig) -> None:
    """Check formats and what they need before anything is built; with mode=auto the callback checks this."""
    formats = list(cfg.get("export_formats") or {})
    quantization = cfg.get("quantization")
    if formats and quantization is None:
        raise CombinationError(
            f"export={','.join(formats)} writes an int8 network, and method={cfg.method.name} creates none: leave it "
            "out, or choose method=qat or method=ptq."
        )
    if formats and quantization.mode != "auto":
        kind: Any = "qat" if quantization.get("kind", "static") == "static" else quantization.kind
        check_formats(formats, Recipe(quantization.mode, quantization.backend, kind=kind))


def build(cfg: DictConfig) -> Objects:
    """Create all objects of a run. Nothing is loaded, downloaded, logged or trained yet.

    Args:
        cfg: The composed configuration of train.py.

    Returns:
        The objects; the quantization callback, if there is one, is the last callback.

    Raises:
        ConfigurationError: An object cannot be created from its part of the configuration.
    """
    callbacks = [FitMetrics(), *(instantiate(part) for part in _parts(cfg, "callbacks"))]
    if cfg.get("quantization") is not None:
        callbacks.append(_quantization(cfg.quantization))
    datamodule = instantiate(cfg.data.datamodule)
    model = instantiate(cfg.model.module)
    loggers = make_loggers(cfg)
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, plugins=plugins())
    return Objects(trainer, model, datamodule, callbacks, loggers, {})


def make_loggers(cfg: DictConfig) -> list[Logger]:
    """Create the loggers of a run."""
    return [instantiate(part) for part in _parts(cfg, "logger")]


def _quantization(part: DictConfig) -> Callback:
    """Create the quantizing callback; a quantizer with ``_target_`` stays a mapping, which a checkpoint can store."""
    backend, rest = part.get("backend"), part.copy()
    given: dict[str, Any] = {}
    if isinstance(backend, DictConfig):
        given["backend"] = OmegaConf.to_container(backend, resolve=True)
        with open_dict(rest):
            del rest["backend"]
    make: Callable[..., Callback] = instantiate(rest, _partial_=True)
    return make(**given)


def fit(cfg: DictConfig, run: Objects) -> None:
    """Train, and keep the metrics logged at the end of training."""
    for logger in run.loggers:
        if isinstance(logger, WandbLogger):
            define_summaries(logger, run.callbacks)
    run.trainer.fit(run.model, datamodule=run.datamodule, ckpt_path=cfg.ckpt_path)
    keep_metrics(run)


def keep_metrics(run: Objects) -> None:
    """Keep the last logged metrics, also those of a resumed fit; a later test would overwrite them."""
    kept = next(callback for callback in run.callbacks if isinstance(callback, FitMetrics))
    logged = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    run.fit_metrics.update(kept.metrics | logged)


def keep_int8(cfg: DictConfig, run: Objects, metrics: Mapping[str, float]) -> None:
    """Save the int8 network in the run's folder, and log it to W&B as an artifact with its figures.

    If it cannot be saved, a warning gives the reason, and the run continues.

    Args:
        cfg: The configuration; with ``save_int8=false`` nothing is saved.
        run: An evaluated run.
        metrics: Result of the evaluation.
    """
    callback = next((c for c in run.callbacks if isinstance(c, QuantizationCallback)), None)
    if not cfg.save_int8 or callback is None or not run.trainer.is_global_zero:
        return
    networks = callback.quantized
    named = networks if isinstance(networks, dict) else {"": networks} if networks is not None else {}
    for name, network in named.items():
        path = join(place(cfg.paths.output_dir), f"model-{name}.int8" if name else INT8_FILE)
        try:
            network.save(path)
        except ArtifactError as error:
            warnings.warn(f"The int8 network could not be saved: {error}", stacklevel=2)
            continue
        for logger in run.loggers:
            if isinstance(logger, WandbLogger):
                log_int8(logger, path, metrics, [f"seed-{cfg.seed}"])


def log_configuration(cfg: DictConfig, loggers: list[Logger]) -> None:
    """Log the whole configuration, with all references resolved, to each logger."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    for logger in loggers:
        logger.log_hyperparams({str(key): value for key, value in resolved.items()})


def quiet() -> None:
    """Suppress warnings of one library about another, which users cannot act on, and advertisements."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated")  # lightning about torch
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata about torch
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


def close(loggers: list[Logger]) -> None:
    """Finish the runs in the loggers, so that the next run of a sweep gets its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
        elif isinstance(logger, CSVLogger):
            logger.save()


def readable_errors() -> AbstractContextManager[None]:
    """Show a mistake in the configuration, including Lightning's errors about it, as one panel, and exit with 1.

    Example:
        >>> with readable_errors():
        ...     raise ConfigurationError("mode=fxx is unknown")
        Traceback (most recent call last):
            ...
        SystemExit: 1
    """
    return in_one_panel(MisconfigurationException)


def _missing(node: Any, path: str = "") -> Iterator[str]:
    """The keys that are ``???``. OmegaConf's own search fails if one of them refers to another."""
    if not OmegaConf.is_config(node) or node._is_none():
        return
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        full = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_missing(node, key):
            yield full
        elif not OmegaConf.is_interpolation(node, key):
            yield from _missing(node[key], full)


def plugins() -> list[Any]:
    """Plugins that write complete checkpoints only, and leave requeueing of Slurm jobs to submitit."""
    found: list[Any] = [WholeFileCheckpointIO()]
    if SLURMEnvironment.detect() and "SUBMITIT_EXECUTOR" in os.environ:
        found.append(SLURMEnvironment(auto_requeue=False))
    return found


def _parts(cfg: DictConfig, group: str) -> list[DictConfig]:
    """The parts of a group that are not null."""
    return [part for part in (cfg.get(group) or {}).values() if part is not None]
