"""Sensitivity of a network that train.py trained, from its configuration and checkpoint, by its validation metric."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils._pytree import tree_map

from qat_lightning.callbacks.parts.calibration_data import calibrate_in_steps
from qat_lightning.callbacks.parts.checkpoints import float_state_dict
from qat_lightning.callbacks.parts.find_networks import find_networks
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.run.metric import ModelMetric
from qat_lightning.sensitivity.measured import RankBy, Sensitivity, sensitivity
from qat_lightning.settings.scheme import Scheme

SQNR = "sqnr"
"""The metric that needs no labels: SQNR of the outputs relative to the float network's."""

SQNR_BATCHES = 8
"""Default number of batches for SQNR; their inputs are kept in memory."""


@dataclass(frozen=True)
class Options:
    """What to measure, in addition to the configuration.

    Attributes:
        metric: A key that ``validation_step`` logs, or `SQNR`; None for the model's own (``model.metric``).
        smaller_is_better: Whether that metric is a loss. For the model's own metric, ``model.metric`` says it.
        calibration_batches: Number of training batches for calibration.
        validation_batches: Number of validation batches; None for all (`SQNR_BATCHES` with `SQNR`).
        rank_by: See `qat_lightning.sensitivity`.

    Raises:
        ConfigurationError: ``smaller_is_better`` is given with `SQNR`.
    """

    metric: str | None = None
    smaller_is_better: bool = False
    calibration_batches: int = 8
    validation_batches: int | None = None
    rank_by: RankBy = "alone"

    def __post_init__(self) -> None:
        """Check that SQNR is not minimized."""
        if self.sqnr and self.smaller_is_better:
            raise ConfigurationError("A larger SQNR is better: leave out --smaller-is-better.")

    @property
    def sqnr(self) -> bool:
        """Whether the metric is SQNR relative to the float network."""
        return self.metric == SQNR

    def with_metric_of(self, cfg: DictConfig) -> Options:
        """Return the options with the model's own metric and direction if no metric is given.

        Configurations of earlier releases contain no metric; they used ``val/acc``.
        """
        own = ModelMetric.of(cfg) or ModelMetric("acc")
        metric = self.metric or own.logged("val")
        smaller = self.smaller_is_better or (metric == own.logged("val") and not own.larger_is_better)
        return replace(self, metric=metric, smaller_is_better=smaller)


def config_of_run(folder: Path, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration that train.py saved in a run's folder, with overrides applied.

    Raises:
        ConfigurationError: The folder contains none.
    """
    saved = folder / ".hydra" / "config.yaml"
    if not saved.is_file():
        raise ConfigurationError(
            f"{folder} is not a run of train.py: it has no .hydra/config.yaml. Give a folder like "
            "outputs/2026-01-31/12-00-00, or --config-dir conf and --checkpoint."
        )
    cfg = OmegaConf.load(saved)
    assert isinstance(cfg, DictConfig)
    merged = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(merged, DictConfig)
    return merged


def composed(folder: Path, overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration that train.py would get from its folder of configurations."""
    if not (folder / "config.yaml").is_file():
        raise ConfigurationError(f"{folder} holds no config.yaml: give the folder conf of train.py.")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        return compose("config", list(overrides))


def measure_run(cfg: DictConfig, checkpoint: Path, options: Options) -> Sensitivity:
    """Rank the layers of a trained LightningModule by its own validation metric, or by the SQNR of its outputs.

    Args:
        cfg: Configuration of train.py: ``model``, ``data``, and ``quantization`` for mode, backend, scheme, include
            and exclude.
        checkpoint: A checkpoint with or without quantization; its weights are measured as float.
        options: What to measure.

    Raises:
        ConfigurationError: The configuration is that of another program, the checkpoint does not match, the metric is
            not logged, or the network is ambiguous.
    """
    if lacking := [key for key in ("model.module", "data.datamodule") if OmegaConf.select(cfg, key) is None]:
        raise ConfigurationError(
            f"This is not a run of train.py: its configuration has no {' and no '.join(lacking)}. In the program that "
            "trained it, use qat_lightning.sensitivity(network, batches, metric=...)."
        )
    if not checkpoint.is_file():
        raise ConfigurationError(f"{checkpoint} is not a file: give --checkpoint, a checkpoint of this model.")
    options = options.with_metric_of(cfg)
    model: LightningModule = instantiate(cfg.model.module)
    _load(model, checkpoint)
    quantization: Any = cfg.get("quantization") or OmegaConf.create({})
    names = find_networks(model, quantization.get("module"))
    if len(names) > 1:
        raise ConfigurationError(f"Several networks could be meant: {', '.join(names)}. Give quantization.module=...")
    validation = _Validation(model, instantiate(cfg.data.datamodule), Slot(model, names[0]), options)
    scheme = quantization.get("scheme")
    return sensitivity(
        validation.slot.get(),
        validation.calls(),
        mode=quantization.get("mode", "fx"),
        backend=quantization.get("backend", "x86"),
        scheme=instantiate(scheme) if scheme is not None else Scheme(),
        metric=None if options.sqnr else validation,
        metric_name="" if options.sqnr else f"{'-' if options.smaller_is_better else ''}{options.metric}",
        calibrate_on=validation.calibrate,
        rank_by=options.rank_by,
        include=tuple(quantization.get("include") or ()),
        exclude=tuple(quantization.get("exclude") or ()),
        prefix=validation.slot.prefix,
        kind=quantization.get("kind", "static"),
    )


def _load(model: LightningModule, checkpoint: Path) -> None:
    try:
        model.load_state_dict(float_state_dict(checkpoint))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigurationError(
            f"{checkpoint} does not match this model: {reason}. Give the configuration that it was trained with."
        ) from error


class _Validation:
    """Validates a network in its slot in the LightningModule."""

    def __init__(self, model: LightningModule, datamodule: Any, slot: Slot, options: Options) -> None:
        self.model, self.datamodule, self.slot, self.options = model, datamodule, slot, options
        batches = options.validation_batches
        self.trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=SQNR_BATCHES if batches is None and options.sqnr else batches,
        )

    def __call__(self, network: nn.Module) -> float:
        before = self.slot.run_instead(network)
        try:
            found = self._validate()
        finally:
            self.slot.run_again(before)
        metric = self.options.metric
        if metric is None or metric not in found:
            raise ConfigurationError(
                f"--metric {metric}: validation_step logs {', '.join(found) or 'nothing'}. Use one of these, or {SQNR}."
            )
        value = float(found[metric])
        return -value if self.options.smaller_is_better else value

    def _validate(self) -> Mapping[str, float]:
        (found, *_) = self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        return found

    def calls(self) -> list[Example]:
        """Return the network's calls in a validation: all for SQNR, otherwise the first."""
        calls: list[Example] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not calls or self.options.sqnr:
                with torch.inference_mode(False):  # the copies are used outside validation's inference mode
                    calls.append(Example(*tree_map(copy.deepcopy, (args, kwargs))))

        called = self.model.get_submodule(self.slot.prefix) if self.slot.prefix else self.model
        handle = called.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self._validate()
        finally:
            handle.remove()
        if not calls:
            raise ConfigurationError(f"validation_step does not call {self.slot.name!r}: give quantization.module=...")
        return calls

    def calibrate(self, prepared: nn.Module) -> None:
        """Calibrate on the training data, through the LightningModule's own step."""
        self.datamodule.setup("fit")
        loader, count = self.datamodule.train_dataloader(), self.options.calibration_batches
        calibrate_in_steps(self.model, {self.slot.name: self.slot}, {self.slot.name: prepared}, loader, count)
