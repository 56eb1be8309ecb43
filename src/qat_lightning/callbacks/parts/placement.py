"""Placing prepared networks in a LightningModule: at the right time, with checks on loading, and cleanup."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.hooks import RemovableHandle

from qat_lightning.callbacks.parts.checkpoint_io import save_whole_files
from qat_lightning.callbacks.parts.checkpoints import exchange_weights, guard_loading, holds_quantization
from qat_lightning.callbacks.parts.example import try_test_step
from qat_lightning.callbacks.parts.find_networks import find_networks
from qat_lightning.callbacks.parts.float_weights import FloatWeights
from qat_lightning.callbacks.parts.learned import keep_from_ddp, learned_parameters
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.callbacks.parts.networks import BEFORE, Networks
from qat_lightning.callbacks.parts.preparation import Preparation, cpu_and_float32
from qat_lightning.callbacks.parts.sharding import (
    before_sharding,
    explain_late_layers,
    refuse_checkpoint,
    refuse_other_weights,
    shards,
)
from qat_lightning.callbacks.parts.together import (
    averages_of,
    leave_uncompiled,
    refuse_averages,
    refuse_shared,
    refuse_shared_layers,
)
from qat_lightning.modes.captured_once import captured_once
from qat_lightning.modes.prepared import is_prepared, prepared_state
from qat_lightning.modes.replaced import refuse_replaced, replaced_layers
from qat_lightning.modes.sharded import is_sharded, keep_form
from qat_lightning.recipes.reworking import reworks


class Placement:
    """Inserts fake-quantization into the networks of a LightningModule before Lightning uses their parameters.

    Args:
        networks: The networks of the callback; found and prepared networks are stored there.
        preparation: Prepares a network.
        floats: The float weights to compare with.
    """

    def __init__(self, networks: Networks, preparation: Preparation, floats: FloatWeights) -> None:
        self.networks = networks
        self._preparation = preparation
        self._floats = floats
        self._guards: list[RemovableHandle] = []
        self._put_back: Callable[[], None] | None = None
        self._save_as_before: Callable[[], None] | None = None

    def arrange(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
        *,
        prepared: Callable[[], None],
        loaded: Callable[[str], None],
    ) -> None:
        """Schedule preparation for when ``configure_model`` is called.

        Lightning calls ``configure_model`` when all layers exist, and before it restores weights, creates optimizers
        and DDP, and moves the model to the device.

        Args:
            trainer: The Trainer, during setup.
            pl_module: The LightningModule.
            stage: The stage it is set up for.
            prepared: Called when the prepared networks are in place.
            loaded: Called when weights are about to be loaded into them, with a description of the source.
        """
        self._save_as_before = save_whole_files(trainer)
        networks = self.networks
        if networks.prepared and next(iter(networks.slots.values())).pl_module is pl_module:
            self._see_replaced(stage, loaded)
            for slot in networks.slots.values():
                slot.follow()
            self._guard_loading(trainer, pl_module, loaded)
            refuse_checkpoint(trainer, networks)

            def run_as_before() -> None:
                pl_module.configure_model()
                self._leave_uncompiled(pl_module, networks.slots)

            self._when_built(pl_module, run_as_before)
            return

        def prepare() -> None:
            if shards(trainer):
                self._prepare_to_shard(trainer, pl_module, stage)
            else:
                pl_module.configure_model()
                self._prepare(trainer, pl_module, stage)
            self._guard_loading(trainer, pl_module, loaded)
            prepared()

        self._when_built(pl_module, prepare)

    def _when_built(self, pl_module: LightningModule, run: Callable[[], None]) -> None:
        """Call ``run`` once, in place of ``configure_model``."""
        had = pl_module.__dict__.get("configure_model")

        def put_back() -> None:
            if had is None:
                pl_module.__dict__.pop("configure_model", None)
            else:
                pl_module.__dict__["configure_model"] = had
            self._put_back = None

        def configure_model() -> None:
            put_back()
            run()

        pl_module.__dict__["configure_model"] = configure_model
        self._put_back = put_back

    def _leave_uncompiled(self, pl_module: LightningModule, slots: Mapping[str, Slot]) -> None:
        leave_uncompiled(pl_module, slots, trains=self.networks.settings.trains, compiles=self.networks.compiled)

    def _see_replaced(self, stage: str, loaded: Callable[[str], None]) -> None:
        """Refuse to train on with layers that were replaced since; otherwise, int8 networks have to be made again."""
        for name, network in self.networks.prepared.items():
            if stage == "fit":
                refuse_replaced(network, name)
            elif replaced_layers(network).keys() - prepared_state(network).left_float.keys():
                loaded("the current weights")

    def _prepare_to_shard(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare before ``configure_model`` shards: afterwards each process has only a part of each layer."""
        self._prepare(trainer, pl_module, stage)
        refuse_checkpoint(trainer, self.networks)
        for network in self.networks.prepared.values():
            if not is_sharded(network):
                keep_form(network)
        with before_sharding(pl_module, self.networks.slots):
            pl_module.configure_model()

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        networks, preparation = self.networks, self._preparation
        with explain_late_layers(trainer):
            slots = {name: Slot(pl_module, name) for name in find_networks(pl_module, networks.settings.module)}
        self._leave_uncompiled(pl_module, slots)
        refuse_other_weights(trainer, slots, given=preparation.given is not None)
        # Lightning builds models on the training's device and in its precision; preparation needs the CPU and float32.
        with cpu_and_float32(), captured_once(), isolate_rng(include_cuda=torch.cuda.is_initialized()):
            examples = preparation.find_examples(trainer, pl_module, slots, stage)
            prepared = {name: slot.get() for name, slot in slots.items()}
            adopted = all(is_prepared(network) for network in prepared.values())
            if adopted:
                refuse_shared(trainer, prepared)
                preparation.check_adopted(prepared, stage)
            else:
                self._floats.check(slots)
                networks.decisions = preparation.decide_all(trainer, slots, examples, stage)
                modes = {name: decision.mode for name, decision in networks.decisions.items()}
                refuse_shared_layers({n: slot.get() for n, slot in slots.items()}, modes, networks.settings.kind)
                several = len(slots) > 1 or reworks(networks.settings.recipe)
                averages = {name: averages_of(pl_module, slot.get()) for name, slot in slots.items()}
                shown = all(decision.rehearsal for decision in networks.decisions.values())
                if any(averages.values()) or (several and not shown):
                    # Preparation may work in place; on copies it is shown to succeed.
                    for name, slot in slots.items():
                        trial = preparation.prepare_one(slot, copy.deepcopy(slot.get()), examples[name])
                        refuse_averages(averages[name], name, slot.get(), trial)
                prepared = {n: preparation.prepare_one(slot, slot.get(), examples[n]) for n, slot in slots.items()}
                for name, slot in slots.items():
                    slot.install(prepared[name])
                preparation.say_what_was_done(prepared)
                if stage == "fit" and preparation.batch is not None:
                    try_test_step(pl_module, list(slots.values()), preparation.batch)
        preparation.batch = None
        if not (adopted and networks.prepared):
            self._floats.forget()
        networks.slots, networks.examples, networks.prepared = slots, examples, prepared
        networks.apply(networks.phase if adopted else BEFORE)
        keep_from_ddp(pl_module, prepared)
        self._floats.read()

    def _guard_loading(self, trainer: Trainer, pl_module: LightningModule, loaded: Callable[[str], None]) -> None:
        def loading() -> None:
            loaded(f"checkpoint {trainer.ckpt_path}" if trainer.ckpt_path else "weights that were loaded")

        prefixes = {name: slot.prefixes for name, slot in self.networks.slots.items()}
        self._guards.append(guard_loading(pl_module, self.networks.prepared, prefixes, loading))
        self._guards += exchange_weights(pl_module, self.networks.prepared)

    def renew_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Reset the optimizer if parameters differ between a float checkpoint and the prepared networks."""
        reworked = any(prepared_state(network).reworking is not None for network in self.networks.prepared.values())
        learned = learned_parameters(self.networks.prepared.values())
        if not reworked and not learned:
            return
        if "state_dict" not in checkpoint:
            return  # already loaded by a sharding strategy; `refuse_checkpoint` has checked it
        if "optimizer_states" in checkpoint and not holds_quantization(checkpoint["state_dict"]):
            checkpoint["optimizer_states"] = []
            rank_zero_warn(
                "The checkpoint is from a float run, "
                + (
                    "whose weights were equalized or folded when they were loaded"
                    if reworked
                    else "without learned scales"
                )
                + ": the optimizer starts afresh."
            )

    def leave_nothing(self) -> None:
        """Remove all hooks and patched methods."""
        for slot in self.networks.slots.values():
            slot.leave()
        if self._put_back is not None:
            self._put_back()
        if self._save_as_before is not None:
            self._save_as_before()
            self._save_as_before = None
        while self._guards:
            self._guards.pop().remove()
