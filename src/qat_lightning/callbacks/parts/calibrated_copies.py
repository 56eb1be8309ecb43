"""Copies of float networks for post-training quantization: finding networks, deciding, calibrating, and updating."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from qat_lightning.callbacks.parts.arguments import check_count, check_flag
from qat_lightning.callbacks.parts.between_processes import copy_from_first_process
from qat_lightning.callbacks.parts.calibration_data import calibration_loader
from qat_lightning.callbacks.parts.calibration_source import CalibrationSource
from qat_lightning.callbacks.parts.coverage_report import log_coverage, wandb_loggers, warn_of_detours
from qat_lightning.callbacks.parts.find_networks import find_networks
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.callbacks.parts.preparation import Preparation
from qat_lightning.callbacks.parts.recipes_in_fit import say_ranges
from qat_lightning.callbacks.parts.together import leave_uncompiled
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import dotted
from qat_lightning.modes.float_state import float_weights
from qat_lightning.modes.prepared import is_prepared
from qat_lightning.recipes.adaround import AdaRound, Reconstruction
from qat_lightning.recipes.adaround import adaround as learn_rounding
from qat_lightning.recipes.bias_correction import correct_biases
from qat_lightning.recipes.blocks import blocks_of
from qat_lightning.recipes.sequential_mse import sequential_mse

PostTrainingKind = Literal["static", "dynamic", "weight_only"]


@dataclass(frozen=True, eq=False)
class CalibrationSettings:
    """The arguments of `PostTrainingQuantization` only; see there.

    Raises:
        ConfigurationError: One is invalid, or not supported for the kind.
    """

    kind: PostTrainingKind = "static"
    calibration_batches: int = 32
    calibration_dataloader: Any = None
    calls: Any = None
    bias_correction: bool = False
    adaround: AdaRound | None = None
    sequential_mse: bool = False

    def __post_init__(self) -> None:
        """Check the values, and that recipes have calibration data."""
        kind, batches = self.kind, self.calibration_batches
        if not isinstance(kind, str) or kind not in get_args(PostTrainingKind):
            raise ConfigurationError(f"kind={kind!r} is unknown: use one of {', '.join(get_args(PostTrainingKind))}.")
        check_count("calibration_batches", batches)
        for name in ("bias_correction", "sequential_mse"):
            check_flag(name, getattr(self, name))
        if self.adaround is not None and not isinstance(self.adaround, AdaRound):
            raise ConfigurationError(
                f"adaround={self.adaround!r} is not valid: give a qat_lightning.AdaRound, or None."
            )
        if kind == "static":
            return
        for name in ("bias_correction", "sequential_mse"):
            if getattr(self, name):
                raise ConfigurationError(
                    f"{name}=True needs calibration data, which kind={kind!r} does not use: use kind='static'."
                )
        if self.adaround is not None:
            raise ConfigurationError(
                f"adaround= needs calibration data, which kind={kind!r} does not use: use kind='static'."
            )
        if self.calls is not None:
            raise ConfigurationError(f"calls= needs kind='static': kind={kind!r} is not calibrated.")

    @property
    def applies_recipes(self) -> bool:
        """Whether recipes change weights or biases on the calibration batches."""
        return self.bias_correction or self.sequential_mse or self.adaround is not None


class CalibratedCopies:
    """Quantizes copies of the networks of a LightningModule, which is not changed.

    Args:
        networks: The networks of the callback; results are stored there.
        preparation: Decides how to quantize a network, and prepares it.
        settings: The calibration settings.

    Attributes:
        made_of: The float weights of the copies, by network name; empty before there are copies.
    """

    def __init__(self, networks: Networks, preparation: Preparation, settings: CalibrationSettings) -> None:
        self.networks = networks
        self.preparation = preparation
        self.settings = settings
        self.made_of: dict[str, dict[str, Tensor]] = {}

    @property
    def settings(self) -> CalibrationSettings:
        """The calibration settings."""
        return self._settings

    @settings.setter
    def settings(self, settings: CalibrationSettings) -> None:
        self._data = CalibrationSource(settings.calibration_batches, settings.calibration_dataloader, settings.calls)
        self._settings = settings

    @property
    def calibrates(self) -> bool:
        """Whether copies are prepared and calibrated; the other kinds convert float networks."""
        return self.settings.kind == "static"

    def forget_others(self, pl_module: LightningModule) -> bool:
        """Discard the networks of another LightningModule; return whether there were any."""
        networks = self.networks
        others = any(slot.pl_module is not pl_module for slot in networks.slots.values())
        if others:
            networks.slots, networks.examples, networks.prepared, networks.decisions = {}, {}, {}, {}
            self.made_of = {}
        return others

    def find(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the networks and an example call of each, unless they are known."""
        known = self.networks.slots
        slots = known or {
            name: Slot(pl_module, name) for name in find_networks(pl_module, self.networks.settings.module)
        }
        leave_uncompiled(pl_module, slots, trains=False, compiles=False)
        if known:
            return
        trained = [name for name, slot in slots.items() if is_prepared(slot.get())]
        if trained:
            raise ConfigurationError(
                f"{trained[0]!r} already has fake-quantization from QuantizationAwareTraining: use only one of the "
                "two callbacks."
            )
        with isolate_rng(include_cuda=torch.cuda.is_initialized()):
            if self.preparation.given is None and self._data.has_calls:
                self.preparation.given = self._data.examples(list(slots))
            self.networks.examples = self.preparation.find_examples(trainer, pl_module, slots, stage)
            if self.settings.adaround is not None:
                _check_blocks(slots, self.networks.examples, self.settings.adaround.blocks)
        self.networks.slots = slots

    def try_before_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before training what would fail after it: preparing, converting and calibrating."""
        self.find(trainer, pl_module, "fit")
        self._ensure_decided(trainer, "fit")
        if not self.calibrates:
            return
        if not all(decision.rehearsal for decision in self.networks.decisions.values()):
            for name in self.networks.slots:
                self._prepare_copy(name)
        self._data.try_it(trainer, pl_module, self.networks.slots)

    def are_present(self) -> bool:
        """Whether the copies have the current weights of the networks."""
        slots = self.networks.slots
        return bool(self.made_of) and all(_has(slot.get(), self.made_of[name]) for name, slot in slots.items())

    def make(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize copies of the networks with their current weights."""
        self.made_of, self.networks.prepared = {}, {}
        if self.calibrates and not self._data.has_calls:  # first, because it may not exist
            calibration_loader(trainer, pl_module, self.settings.calibration_dataloader)
        self._ensure_decided(trainer, str(trainer.state.fn))
        if self.calibrates:
            self.networks.prepared = self._calibrated(trainer, pl_module)
            if wandb_loggers(trainer):
                log_coverage(trainer, "quant/coverage_prepared", self.networks.coverage_rows())
        self.made_of = {name: _weights(slot.get()) for name, slot in self.networks.slots.items()}

    def _ensure_decided(self, trainer: Trainer, stage: str) -> None:
        """Decide how to quantize networks, unless a checkpoint or an earlier fit has decided it."""
        networks = self.networks
        new = {name: slot for name, slot in networks.slots.items() if name not in networks.decisions}
        if new:
            with isolate_rng(include_cuda=torch.cuda.is_initialized()):
                decided = self.preparation.decide_all(trainer, new, networks.examples, stage)
            networks.decisions |= decided
            warn_of_detours(networks.settings.recipe_for(decision.mode) for decision in decided.values())

    def _calibrated(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, nn.Module]:
        prepared = {name: self._prepare_copy(name) for name in self.networks.slots}
        self.preparation.say_what_was_done(prepared)
        for network in prepared.values():
            network.to(pl_module.device)
        recipes = self.settings.applies_recipes
        slots = self.networks.slots
        count, calls = self._data.calibrate(trainer, pl_module, slots, prepared, keep_calls=recipes)
        rank_zero_info(f"Calibrated on {count} batches.")
        if recipes:
            self._apply_recipes(prepared, calls)
        if trainer.world_size > 1:
            copy_from_first_process(prepared)
        return prepared

    def _prepare_copy(self, name: str) -> nn.Module:
        """Return a prepared copy in float32, for any precision of the training: it is calibrated, not trained."""
        slot = self.networks.slots[name]
        return self.preparation.prepare_one(slot, copy.deepcopy(slot.get()).float(), self.networks.examples[name])

    def _apply_recipes(self, prepared: dict[str, nn.Module], calls: Mapping[str, list[Example]]) -> None:
        """Apply sequential MSE, AdaRound and bias correction on the calibration batches."""
        for name, network in prepared.items():
            before = float_weights(network)
            if self.settings.sequential_mse:
                say_ranges(name, sequential_mse(network, calls[name]))
            if self.settings.adaround is not None:
                learn_rounding(network, calls[name], self.settings.adaround, progress=_log_progress)
            if self.settings.bias_correction:
                corrected = correct_biases(network, calls[name], before)
                rank_zero_info(f"{name!r}: the biases of {len(corrected)} layers were corrected.")


def _check_blocks(slots: Mapping[str, Slot], examples: Mapping[str, Example], wanted: str | Sequence[str]) -> None:
    """Raise for invalid names of blocks, before training."""
    if isinstance(wanted, str):
        return
    starts = tuple(dotted(slot.prefix) for slot in slots.values())
    for name in wanted:
        if not name.startswith(starts):
            raise ConfigurationError(
                f"adaround.blocks={name!r} is in no network that is quantized: give names that begin with "
                f"{' or '.join(map(repr, starts))}."
            )
    for name, slot in slots.items():
        blocks_of(copy.deepcopy(slot.get()).eval(), examples[name], wanted, slot.prefix)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in network.state_dict().items() if isinstance(value, Tensor)}


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.cpu().clone() for key, value in _tensors(network).items()}


def _has(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    now = _tensors(network)
    return now.keys() == weights.keys() and all(torch.equal(now[key].cpu(), weights[key]) for key in now)


def _log_progress(number: int, layers: int, name: str, result: Reconstruction) -> None:
    rank_zero_info(
        f"AdaRound, {number} of {layers}, {name}: error {result.nearest:.2e} with rounding to nearest, "
        f"{result.learned:.2e} now."
    )
