"""What the quantizing callbacks share, first part: fake-quant goes into the networks of a LightningModule in time."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks.parts.arguments import check_flag, check_names, check_word
from qat_lightning.callbacks.parts.checkpoint_io import save_whole_files
from qat_lightning.callbacks.parts.checkpoints import guard_loading, holds_quantization, note_added_keys
from qat_lightning.callbacks.parts.example import catch_examples
from qat_lightning.callbacks.parts.learned import learned_parameters
from qat_lightning.callbacks.parts.network import Slot, find_networks
from qat_lightning.callbacks.parts.resuming import checkpoint_to_restore, decision_in, peek, with_weights
from qat_lightning.callbacks.parts.together import (
    explain_launch,
    refuse_callbacks,
    refuse_compiled,
    refuse_strategy,
    stop_recording_layers,
)
from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.graph.example import Example, check_example, examples_from_user, from_user, refuse_old_norms
from qat_lightning.graph.training_flags import parts_keep_training
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import cpu_copy, is_prepared, prepared_state, set_phase
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.registry import get_mode
from qat_lightning.processes import in_first, several_processes
from qat_lightning.recipes.reworking import Reworking, reworks
from qat_lightning.rehearsal.auto import Decision, choose_mode, decide
from qat_lightning.rehearsal.rehearse import Inspect, OnFault
from qat_lightning.settings.backends import get_backend, require
from qat_lightning.settings.recipe import BatchNormHandling, Equalization, Kind, Recipe, check_globs
from qat_lightning.settings.schedule import Phase
from qat_lightning.settings.scheme import Scheme

BEFORE = Phase(fake_quant=False, observers=True, batchnorm_frozen=False)
"""The phase in which every fit begins."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One network of a LightningModule, for callbacks that go with the one that quantizes.

    Attributes:
        slot: Its place.
        prepared: The network with fake-quant.
        example: The call that it was prepared with.
    """

    slot: Slot
    prepared: nn.Module
    example: Example


class PreparingCallback(Callback):
    """Puts fake-quant into the networks of a LightningModule, and leaves nothing else on it.

    Args:
        mode: See `QuantizationAwareTraining`, as for all that follows.
        backend: The target.
        module: Which networks.
        example_inputs: One call.
        scheme: Bits and granularity.
        include: Globs of what to quantize.
        exclude: Globs of what stays float.
        equalization: Whether weights are equalized before.
        batchnorm: Whether BatchNorm stays.
        rehearse: Whether all up to the int8 file is tried on a copy before a training.
        on_fault: What becomes of what cannot be int8.
    """

    _KIND: Kind = "qat"

    def __init__(
        self,
        mode: str,
        backend: str,
        module: str | list[str] | None,
        example_inputs: Any,
        scheme: Scheme | None,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        *,
        equalization: Equalization = "none",
        batchnorm: BatchNormHandling = "fused",
        rehearse: bool = True,
        on_fault: OnFault = "leave_float",
    ) -> None:
        check_word("mode", mode)
        check_word("backend", backend)
        target = get_backend(backend, mode)
        require(target)
        # Which names there are is known at the fit only.
        if module is not None and not isinstance(module, str):
            check_names("module", module, example="['encoder', 'head']")
        self.mode = mode
        self.backend = backend
        self.module = module
        self.scheme = scheme if scheme is not None else Scheme()
        if not isinstance(self.scheme, Scheme):
            raise ConfigurationError(f"scheme={scheme!r} is not possible: give a qat_lightning.Scheme.")
        self.include = check_names("include", include, example="['head.*']")
        self.exclude = check_names("exclude", exclude, example="['head.*']")
        self.equalization = equalization
        self.batchnorm = batchnorm
        check_flag("rehearse", rehearse)
        if on_fault not in get_args(OnFault):
            raise ConfigurationError(f"on_fault={on_fault!r} is unknown: use one of {', '.join(get_args(OnFault))}.")
        self.rehearse = rehearse
        self.on_fault = on_fault
        self._recipe(target.modes[0] if mode == "auto" else mode)
        self._user_example = example_inputs
        if example_inputs is not None and isinstance(module, (str, type(None))):
            from_user(example_inputs)
        self._slots: dict[str, Slot] = {}
        self._prepared: dict[str, nn.Module] = {}
        self._examples: dict[str, Example] = {}
        self._decisions: dict[str, Decision] = {}
        self._phase = BEFORE
        self._guard: RemovableHandle | None = None
        self._put_back: Callable[[], None] | None = None
        self._save_as_before: Callable[[], None] | None = None

    @property
    def prepared(self) -> Any:
        """The network with fake-quant, a dict of them for several, or None before the fit."""
        return one_or_all(self._prepared)

    @property
    def prepared_networks(self) -> dict[str, nn.Module]:
        """The networks with fake-quant by their names; empty before the fit."""
        return dict(self._prepared)

    @property
    def coverage(self) -> Any:
        """What conversion is going to make int8, and why it leaves the rest: a list of `LayerCoverage` rows.

        Worked out anew from the prepared network; a dict of lists for several networks, None before there is one. What
        conversion did is in ``quantized.coverage`` (layers) and ``quantized.operations``.
        """
        return one_or_all({name: self._coverage(name) for name in self._prepared})

    def _coverage(self, name: str) -> list[LayerCoverage]:
        prepared = self._prepared[name]
        mode = get_mode(prepared_state(prepared).recipe.mode)
        with isolate_rng(include_cuda=torch.cuda.is_initialized()):
            return mode.coverage(cpu_copy(prepared), self._examples[name])

    @property
    def example_inputs_(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call that the (first) network was prepared with: positional and keyword inputs, on the CPU."""
        if not self._examples:
            raise ConfigurationError(
                "There are no example inputs yet: nothing was fitted or tested with this callback."
            )
        example = next(iter(self._examples.values()))
        return example.args, example.kwargs

    @property
    def phase(self) -> Phase:
        """What is on now."""
        return self._phase

    @property
    def chosen_modes(self) -> dict[str, str]:
        """The mode of each network, which ``mode="auto"`` leaves open; empty before it is chosen."""
        made = {name: prepared_state(prepared).recipe.mode for name, prepared in self._prepared.items()}
        return {name: decision.mode for name, decision in self._decisions.items()} | made

    def parts(self) -> dict[str, Part]:
        """The networks by name; none before the fit has begun."""
        return {
            name: Part(slot, self._prepared[name], self._examples[name])
            for name, slot in self._slots.items()
            if name in self._prepared
        }

    # Insert

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange for the network to be prepared before weights restore, optimizers, DDP and the device see it.

        Lightning calls ``configure_model`` next to last before it restores weights, when all layers exist.
        """
        refuse_strategy(trainer)
        stop_recording_layers(trainer)
        refuse_callbacks(trainer, self, self.mode)
        self._leave_nothing()
        self._save_as_before = save_whole_files(trainer)
        if self._prepared and next(iter(self._slots.values())).pl_module is pl_module:
            self._guard_loading(trainer, pl_module)
            return
        had = pl_module.__dict__.get("configure_model")

        def put_back() -> None:
            if had is None:
                pl_module.__dict__.pop("configure_model", None)
            else:
                pl_module.__dict__["configure_model"] = had
            self._put_back = None

        def configure_model() -> None:
            put_back()
            pl_module.configure_model()
            self._prepare(trainer, pl_module, stage)

        pl_module.__dict__["configure_model"] = configure_model
        self._put_back = put_back

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        slots = {name: Slot(pl_module, name) for name in find_networks(pl_module, self.module)}
        # Lightning builds models on the device and in the precision of the training; this is before either.
        with _cpu_and_float32(), isolate_rng(include_cuda=torch.cuda.is_initialized()):
            examples = self._find_examples(trainer, pl_module, slots, stage)
            prepared = {name: slot.get() for name, slot in slots.items()}
            adopted = all(is_prepared(network) for network in prepared.values())
            if adopted:
                self._check_adopted(prepared)
            else:
                self._will_prepare(slots)
                self._decisions = self._decide_all(trainer, slots, examples, stage)
                several = len(slots) > 1 or reworks(self._any_recipe())
                if several and not all(decision.rehearsal for decision in self._decisions.values()):
                    # Preparing may work in place: that all can be prepared is tried on copies.
                    for name, slot in slots.items():
                        self._prepare_one(slot, copy.deepcopy(slot.get()), examples[name])
                prepared = {name: self._prepare_one(slot, slot.get(), examples[name]) for name, slot in slots.items()}
                for name, slot in slots.items():
                    slot.install(prepared[name])
                self._say_what_was_done(prepared)
        if not (adopted and self._prepared):
            self._new_networks()
        self._slots, self._examples, self._prepared = slots, examples, prepared
        self._apply(self._phase if adopted else BEFORE)
        self._guard_loading(trainer, pl_module)
        self._was_prepared()

    def _prepare_one(self, slot: Slot, network: nn.Module, example: Example) -> nn.Module:
        network.cpu()
        # Networks are prepared in float32; one that was built in the precision of the training goes back to it.
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
        decision = self._decisions[slot.name]
        reworking = self._rework(network, slot, example)
        recipe = self._recipe(decision.mode)
        try:
            with warnings.catch_warnings(), parts_keep_training(network) as keep:
                prepared = keep(get_mode(recipe.mode).prepare(network, example, recipe, prefix=slot.prefix))
        except NetworkError as error:
            raise self._with_globs(error) from error
        prepared_state(prepared).__dict__["reworking"] = reworking
        leave_float(prepared, decision.left_float, example)
        return prepared

    def _with_globs(self, error: NetworkError) -> NetworkError:
        """An error with the globs that may be why, if there are some."""
        if not (self.include or self.exclude):
            return error
        return type(error)(f"{error} (include={list(self.include)}, exclude={list(self.exclude)})")

    def _decide_all(
        self, trainer: Trainer, slots: Mapping[str, Slot], examples: Mapping[str, Example], stage: str
    ) -> dict[str, Decision]:
        """What is decided of each network: by the checkpoint, else by the first process for all of them."""
        state = peek(checkpoint_to_restore(trainer))
        kept = {name: decision_in(state, slot.prefix) for name, slot in slots.items()}
        found = {name: d for name, d in kept.items() if d is not None and self.mode in ("auto", d.mode)}
        waiting = [name for name in slots if name not in found]
        for name in found:
            check_example(slots[name].get(), examples[name], name=name, given=self._user_example is not None)
            check_globs(self._any_recipe(), _module_names(slots[name]))

        def decide_rest() -> dict[str, Decision]:
            return {name: self._decide(trainer, slots[name], examples[name], state, stage) for name in waiting}

        found |= in_first(decide_rest) if several_processes(trainer) and waiting else decide_rest()
        for name in waiting:
            self._say_decision(name, found[name])
        return found

    def _decide(self, trainer: Trainer, slot: Slot, example: Example, state: Mapping[str, Any], stage: str) -> Decision:
        """The mode of a network and what of it stays float, rehearsed on a copy if it is going to be trained."""
        network = copy.deepcopy(slot.get()).cpu().float()
        check_example(network, example, name=slot.name, given=self._user_example is not None)
        check_globs(self._any_recipe(), _module_names(slot))
        with_weights(network, state or self._weights_to_rehearse(), slot.prefix)
        self._rework(network, slot, example)

        def admits(mode: str) -> None:
            refuse_compiled(network, slot.prefix, mode)

        try:
            if not (self.rehearse and self._rehearses(stage)):
                if self.mode != "auto":
                    admits(self.mode)
                return choose_mode(self.mode, network, example, self._recipe, prefix=slot.prefix)
            return decide(
                self.mode,
                network,
                example,
                self._recipe,
                prefix=slot.prefix,
                on_fault=self.on_fault,
                admits=admits,
                inspect=self._inspecting(trainer, slot),
            )
        except NetworkError as error:
            raise self._with_globs(error) from error

    def _rehearses(self, stage: str) -> bool:
        """Whether a stage is worth a rehearsal: the one that trains, and every one for which a mode is to be chosen."""
        return stage == "fit" or self.mode == "auto"

    def _weights_to_rehearse(self) -> Mapping[str, Any]:
        """Weights that are nearer to the trained ones than those of the present network, if there are some."""
        return {}

    @staticmethod
    def _inspecting(trainer: Trainer, slot: Slot) -> Inspect | None:
        """Callbacks that try something with the int8 network of a rehearsal have a method ``on_rehearsal``."""
        callbacks = [c for c in trainer.callbacks if hasattr(c, "on_rehearsal")]  # type: ignore[attr-defined]
        if not callbacks:
            return None

        def inspect(quantized: QuantizedNetwork, reference: nn.Module) -> None:
            for callback in callbacks:
                callback.on_rehearsal(trainer, slot.name, quantized, reference)

        return inspect

    def _say_decision(self, name: str, decision: Decision) -> None:
        if decision.why:
            rank_zero_info(f"mode='auto', {name!r}: {decision.why}")
        if decision.rehearsal is not None and decision.rehearsal.unsaved:
            rank_zero_warn(
                f"No file will hold the int8 network of {name!r}: {decision.rehearsal.unsaved} It can be run in this "
                "process."
            )

    def _any_recipe(self) -> Recipe:
        """The recipe, but for the mode."""
        return self._recipe(get_backend(self.backend, self.mode).modes[0] if self.mode == "auto" else self.mode)

    def _rework(self, network: nn.Module, slot: Slot, example: Example) -> Reworking | None:
        """Equalize and fold a float network, in place, as the settings say; None if they say nothing."""
        recipe = self._any_recipe()
        if not reworks(recipe):
            return None
        return Reworking(network, example, recipe)

    @staticmethod
    def _say_what_was_done(prepared: Mapping[str, nn.Module]) -> None:
        """Once the networks that stay are made; those that were tried are as others."""
        for name, network in prepared.items():
            reworking = prepared_state(network).reworking
            for note in reworking.notes if reworking is not None else ():
                rank_zero_info(f"{name!r}. {note}")

    def _check_adopted(self, prepared: Mapping[str, nn.Module]) -> None:
        """Take over networks that are prepared already (by a copy of this callback, say), if they are as we would."""
        for name, network in prepared.items():
            recipe = prepared_state(network).recipe
            differences = self._recipe(recipe.mode if self.mode == "auto" else self.mode).differences(recipe)
            if differences:
                raise ConfigurationError(
                    f"{name!r} was prepared by another callback with other settings ('there'): "
                    f"{'; '.join(differences)}. Give this callback the same, or use a new LightningModule."
                )

    def _find_examples(
        self, trainer: Trainer, pl_module: LightningModule, slots: Mapping[str, Slot], stage: str
    ) -> dict[str, Example]:
        for name, slot in slots.items():
            refuse_old_norms(slot.get(), name)
        if self._user_example is None:
            return catch_examples(trainer, pl_module, list(slots.values()), stage)
        return examples_from_user(self._user_example, list(slots))

    def _will_prepare(self, slots: Mapping[str, Slot]) -> None:
        """For a callback that has more to check before anything is changed."""

    def _new_networks(self) -> None:
        """For a callback that knows something of the networks that it had before."""

    def _was_prepared(self) -> None:
        """For a callback that has more to do once its networks are prepared."""

    def _was_loaded(self, source: str) -> None:
        """For a callback that has made something of the weights, which are now those of ``source``."""

    def _recipe(self, mode: str) -> Recipe:
        return Recipe(
            mode, self.backend, self.scheme, self.include, self.exclude, self._KIND, self.equalization, self.batchnorm
        )

    def _guard_loading(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def loaded() -> None:
            self._was_loaded(f"checkpoint {trainer.ckpt_path}" if trainer.ckpt_path else "weights that were loaded")

        self._guard = guard_loading(pl_module, self._prepared, {n: s.prefix for n, s in self._slots.items()}, loaded)

    def _apply(self, phase: Phase) -> None:
        self._phase = phase
        for prepared in self._prepared.values():
            set_phase(prepared, **dataclasses.asdict(phase))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the optimizer begin anew where a float checkpoint's parameters are other ones than those that train."""
        reworked = any(prepared_state(network).reworking is not None for network in self._prepared.values())
        learned = learned_parameters(self._prepared.values())
        if not reworked and not learned:
            return
        if "optimizer_states" in checkpoint and not holds_quantization(checkpoint["state_dict"]):
            checkpoint["optimizer_states"] = []
            rank_zero_warn(
                "The checkpoint is of a float run, "
                + (
                    "whose weights were equalized or folded as they were loaded"
                    if reworked
                    else "without learned scales"
                )
                + ": the optimizer begins anew."
            )

    # End

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook and no patched method behind: ``teardown`` does not follow."""
        self._leave_nothing()
        explain_launch(trainer, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook and no patched method behind."""
        self._leave_nothing()

    def _leave_nothing(self) -> None:
        if self._put_back is not None:
            self._put_back()
        if self._save_as_before is not None:
            self._save_as_before()
            self._save_as_before = None
        if self._guard is not None:
            self._guard.remove()
            self._guard = None


def one_or_all(networks: dict[str, Any]) -> Any:
    """What a user gets of networks by name: the only one by itself, or None."""
    if not networks:
        return None
    return next(iter(networks.values())) if len(networks) == 1 else dict(networks)


def _module_names(slot: Slot) -> list[str]:
    """The names of a network's modules in the LightningModule."""
    return [f"{slot.prefix}.{name}".strip(".") for name, _ in slot.get().named_modules() if name or slot.prefix]


@contextmanager
def _cpu_and_float32() -> Iterator[None]:
    """Make tensors as outside Lightning's contexts for building a model."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
