"""Deciding how to quantize each network, rehearsing it on a copy, and inserting fake-quantization."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks.parts.checkpoints import note_added_keys
from qat_lightning.callbacks.parts.example import catch_examples
from qat_lightning.callbacks.parts.float_weights import FloatWeights
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.callbacks.parts.resuming import (
    checkpoint_to_restore,
    decision_in,
    peek,
    trusts_checkpoint,
    with_weights,
)
from qat_lightning.callbacks.parts.untouched import nothing_moves
from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.export.plain_tensors import in_its_runtime
from qat_lightning.graph.example import Example, check_example, examples_from_user, few_samples, refuse_old_norms
from qat_lightning.graph.hooks import share_hooks
from qat_lightning.graph.lazy import is_lazy, materialize
from qat_lightning.graph.scopes import join
from qat_lightning.graph.training_flags import parts_keep_training
from qat_lightning.modes.compiling import refuse_compile
from qat_lightning.modes.layer_schemes import check_overrides_of
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.registry import mode_for
from qat_lightning.modes.replaced import refuse_replaced
from qat_lightning.modes.uncalibrated.adapters import refuse_adapters
from qat_lightning.processes import in_first, several_processes
from qat_lightning.recipes.reworking import Reworking, reworks
from qat_lightning.rehearsal.auto import Decision, choose_mode, decide
from qat_lightning.rehearsal.rehearse import Inspect
from qat_lightning.settings.recipe import check_globs


class Preparation:
    """Decides how to quantize networks, and prepares them one by one; `Placement` puts them in place.

    Args:
        networks: The networks of the callback; decisions are read there.
        floats: Float weights that are closer to the trained ones than the current weights, if any.

    Attributes:
        given: The example inputs given by the user; None to record them from a batch.
        batch: The batch from which examples were recorded, until the networks are prepared.
    """

    def __init__(self, networks: Networks, floats: FloatWeights | None = None) -> None:
        self.networks = networks
        self.given = networks.settings.example_inputs
        self.batch: Any = None
        self._floats = floats
        self._remarks: list[str] = []  # of a rehearsal, during which warnings are silenced

    def find_examples(
        self, trainer: Trainer, pl_module: LightningModule, slots: Mapping[str, Slot], stage: str
    ) -> dict[str, Example]:
        """Return an example call of each network: as given, or recorded from a real batch. Initializes lazy modules."""
        for name, slot in slots.items():
            refuse_old_norms(slot.get(), name)
            share_hooks(slot.get())
        found = self._examples(trainer, pl_module, slots, stage)
        if any(map(is_lazy, pl_module.modules())):
            with nothing_moves(pl_module):
                for name, slot in slots.items():
                    materialize(slot.get(), found[name])
        return found

    def _examples(
        self, trainer: Trainer, pl_module: LightningModule, slots: Mapping[str, Slot], stage: str
    ) -> dict[str, Example]:
        if self.given is not None:
            found = examples_from_user(self.given, list(slots))
        else:
            found, self.batch = catch_examples(trainer, pl_module, list(slots.values()), stage)
        found = {name: few_samples(slots[name].get(), call) for name, call in found.items()}
        if self.given is not None:
            return found
        if self.networks.settings.smoothquant is not None and several_processes(trainer):
            # Recipes change weights according to observed activations, which must be equal in all processes.
            return in_first(lambda: found)
        return found

    def decide_all(
        self, trainer: Trainer, slots: Mapping[str, Slot], examples: Mapping[str, Example], stage: str
    ) -> dict[str, Decision]:
        """Return the decision about each network: from the checkpoint, otherwise made by the first process for all."""
        settings = self.networks.settings
        check_overrides_of({slot.prefix: slot.get() for slot in slots.values()}, settings.recipe)
        state = peek(checkpoint_to_restore(trainer), trusted=trusts_checkpoint(trainer))
        kept = {name: decision_in(state, slot.prefix) for name, slot in slots.items()}
        found = {name: d for name, d in kept.items() if d is not None and settings.mode in ("auto", d.mode)}
        waiting = [name for name in slots if name not in found]
        for name in found:
            check_example(slots[name].get(), examples[name], name=name, given=self.given is not None)
            check_globs(settings.recipe, _module_names(slots[name]))

        def decide_rest() -> dict[str, Decision]:
            return {name: self._decide(trainer, slots[name], examples[name], state, stage) for name in waiting}

        self._remarks = []
        found |= in_first(decide_rest) if several_processes(trainer) and waiting else decide_rest()
        for name in waiting:
            self._log_decision(name, found[name])
        for remark in self._remarks:
            rank_zero_warn(remark)
        return found

    def _decide(self, trainer: Trainer, slot: Slot, example: Example, state: Mapping[str, Any], stage: str) -> Decision:
        """Choose a network's mode and float layers, by a rehearsal on a copy if it will be converted."""
        settings = self.networks.settings
        network = copy.deepcopy(slot.get()).cpu().float()
        check_example(network, example, name=slot.name, given=self.given is not None)
        check_globs(settings.recipe, _module_names(slot))
        refuse_adapters(network, settings.recipe)
        with_weights(network, state or (self._floats.to_rehearse() if self._floats is not None else {}), slot.prefix)
        self.rework(network, slot, example)

        def admits(mode: str) -> None:
            if self.networks.compiled and stage == "fit":
                refuse_compile(mode)

        try:
            if not self._rehearses(stage):
                if settings.mode != "auto":
                    admits(settings.mode)
                return choose_mode(settings.mode, network, example, settings.recipe_for, prefix=slot.prefix)
            return decide(
                settings.mode,
                network,
                example,
                settings.recipe_for,
                prefix=slot.prefix,
                on_fault=settings.on_fault,
                admits=admits,
                inspect=self._inspecting(trainer, slot),
            )
        except NetworkError as error:
            raise self._with_globs(error) from error

    def _rehearses(self, stage: str) -> bool:
        """Whether a stage needs a rehearsal: if it leads to an int8 network, or has to choose a mode.

        Trained networks are converted after a fit; others after calibration, in any stage.
        """
        settings = self.networks.settings
        converts = settings.convert_on_fit_end and (stage == "fit" or not settings.trains)
        return settings.rehearse and (settings.mode == "auto" or converts)

    def _inspecting(self, trainer: Trainer, slot: Slot) -> Inspect | None:
        """Return a function that passes the rehearsal's int8 network to callbacks with a method ``on_rehearsal``."""
        callbacks = [c for c in trainer.callbacks if hasattr(c, "on_rehearsal")]  # type: ignore[attr-defined]
        runtime = self.networks.settings.runtime
        if not callbacks and runtime is None:
            return None

        def inspect(quantized: QuantizedNetwork, reference: nn.Module) -> None:
            quantized = in_its_runtime(quantized)
            for callback in callbacks:
                self._remarks += callback.on_rehearsal(trainer, slot.name, quantized, reference)

        return inspect

    def _log_decision(self, name: str, decision: Decision) -> None:
        if decision.why:
            rank_zero_info(f"mode='auto', {name!r}: {decision.why}")
        if decision.rehearsal is not None and decision.rehearsal.unsaved:
            rank_zero_warn(
                f"The int8 network of {name!r} cannot be saved to a file: {decision.rehearsal.unsaved} It runs in "
                "this process only."
            )

    def rework(self, network: nn.Module, slot: Slot, example: Example) -> Reworking | None:
        """Equalize, fold, smooth and rotate a float network in place, as set; None if nothing is set."""
        recipe = self.networks.settings.recipe
        if not reworks(recipe):
            return None
        return Reworking(network, example, recipe)

    def prepare_one(self, slot: Slot, network: nn.Module, example: Example) -> nn.Module:
        """Insert fake-quantization into a network according to its decision; possibly in place."""
        network.cpu()
        # Networks are prepared in float32, and then converted back to the precision that they were built in.
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        if dtype != torch.float32:
            network.float()
        try:
            prepared = self._prepare_float32(network, slot, example)
        except BaseException:
            if dtype != torch.float32:
                network.to(dtype)
            raise
        if dtype != torch.float32:
            prepared.to(dtype)
        note_added_keys(prepared)
        return prepared

    def _prepare_float32(self, network: nn.Module, slot: Slot, example: Example) -> nn.Module:
        decision = self.networks.decisions[slot.name]
        reworking = self.rework(network, slot, example)
        recipe = replace(self.networks.settings.recipe_for(decision.mode), families=decision.families)
        try:
            with warnings.catch_warnings(), parts_keep_training(network) as keep:
                prepared = keep(mode_for(recipe).prepare(network, example, recipe, prefix=slot.prefix))
        except NetworkError as error:
            raise self._with_globs(error) from error
        prepared_state(prepared).__dict__["reworking"] = reworking
        leave_float(prepared, decision.left_float, example)
        return prepared

    def _with_globs(self, error: NetworkError) -> NetworkError:
        """Add to an error the globs that may have caused it, if any."""
        recipe = self.networks.settings.recipe
        if not (recipe.include or recipe.exclude):
            return error
        return type(error)(f"{error} (include={list(recipe.include)}, exclude={list(recipe.exclude)})")

    @staticmethod
    def say_what_was_done(prepared: Mapping[str, nn.Module]) -> None:
        """Log what was done to networks, once the final ones are prepared; rehearsed copies are not reported."""
        for name, network in prepared.items():
            reworking = prepared_state(network).reworking
            for note in reworking.notes if reworking is not None else ():
                rank_zero_info(f"{name!r}. {note}")

    def check_adopted(self, prepared: Mapping[str, nn.Module], stage: str) -> None:
        """Use networks that are already prepared (for example by a copy of this callback), if the settings agree."""
        for name, network in prepared.items():
            if stage == "fit":
                refuse_replaced(network, name)
            recipe = prepared_state(network).recipe
            settings = self.networks.settings
            wanted = settings.recipe_for(recipe.mode if settings.mode == "auto" else settings.mode)
            differences = wanted.differences(recipe)
            if differences:
                raise ConfigurationError(
                    f"{name!r} was prepared by another callback with other settings ('there'): "
                    f"{'; '.join(differences)}. Give this callback the same, or use a new LightningModule."
                )


def _module_names(slot: Slot) -> list[str]:
    """Return the names of a network's modules in the LightningModule."""
    return [join(slot.prefix, name) for name, _ in slot.get().named_modules() if name or slot.prefix]


@contextmanager
def cpu_and_float32() -> Iterator[None]:
    """Create tensors on the CPU and in float32 within Lightning's contexts for building a model."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
