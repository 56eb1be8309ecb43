"""The callback that trains nothing: int8 from a float network, with a few batches or none."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from qat_lightning.callbacks.parts.arguments import check_flag
from qat_lightning.callbacks.parts.between_processes import take_over_from_first
from qat_lightning.callbacks.parts.calibration_data import calibration_loader
from qat_lightning.callbacks.parts.calibration_source import CalibrationSource
from qat_lightning.callbacks.parts.coverage_report import log_coverage, wandb_loggers
from qat_lightning.callbacks.parts.network import Slot, find_networks
from qat_lightning.callbacks.parts.preparing import one_or_all
from qat_lightning.callbacks.parts.steps import has_trained
from qat_lightning.callbacks.parts.together import mend_resume, refuse_strategy, stop_recording_layers
from qat_lightning.callbacks.quantization_callback import QuantizationCallback
from qat_lightning.errors import ConfigurationError
from qat_lightning.modes.float_state import float_weights
from qat_lightning.modes.prepared import is_prepared
from qat_lightning.recipes.adaround import AdaRound, Reconstruction
from qat_lightning.recipes.adaround import adaround as learn_rounding
from qat_lightning.recipes.bias_correction import correct_biases
from qat_lightning.rehearsal.auto import Decision
from qat_lightning.rehearsal.faults import Conversion, leaving_float, quantize_what_can_be
from qat_lightning.rehearsal.rehearse import OnFault
from qat_lightning.settings.kinds import check_kind
from qat_lightning.settings.recipe import Equalization, Recipe
from qat_lightning.settings.schedule import Phase
from qat_lightning.settings.scheme import Scheme

_ROUNDING = Phase(fake_quant=True, observers=False, batchnorm_frozen=True)

PostTrainingKind = Literal["static", "dynamic", "weight_only"]


class PostTrainingQuantization(QuantizationCallback):
    """Quantizes the network of a LightningModule without training it for the grid.

    The LightningModule keeps its float network, and its checkpoints are those of a float run. After a fit, or before
    ``validate``, ``test`` or ``predict`` of a Trainer that fitted nothing, a copy of the network is calibrated and
    converted. It is made anew whenever the weights are others, so ``ckpt_path=`` of any float run works.
    ``trainer.validate`` then runs fake-quant, ``trainer.test`` and ``trainer.predict`` int8; a validation during a fit
    runs float.

    Args:
        mode: ``"fx"``, ``"eager"``, ``"pt2e"``, or ``"auto"``.
        backend: As for `QuantizationAwareTraining`.
        module: As for `QuantizationAwareTraining`.
        example_inputs: As for `QuantizationAwareTraining`.
        scheme: Bits, granularity and observers.
        kind: ``"static"``: ranges of activations from ``calibration_batches``; ``"dynamic"``: ranges worked out for
            each input; ``"weight_only"``: integers for weights, activations in float.
        calibration_batches: Batches to calibrate with, for ``kind="static"``.
        calibration_dataloader: Where they come from; by default the training's loader. They go through
            ``training_step`` in evaluation, or through ``validation_step`` where that does not call the network.
        calls: Calls of the network to calibrate with instead, a tensor, a tuple or a dict each (a dict of such lists by
            name for several networks): for a LightningModule whose steps do not call it in evaluation.
        include: Globs of module names, relative to the LightningModule; only these are quantized.
        exclude: Globs of module names that stay float.
        equalization: Make neighbouring layers share the range of their weights before anything is rounded:
            ``"exact"`` where the network stays the same, ``"replace_relu6"`` also across ReLU6, which become ReLU.
        bias_correction: Take the mean error of rounded weights out of each layer's output, on the batches of the
            calibration.
        adaround: Learn for each weight whether it is rounded up or down, on the same batches; None to round to the
            nearest.
        rehearse: As for `QuantizationAwareTraining`; it is rehearsed when a fit begins.
        on_fault: As for `QuantizationAwareTraining`.

    Attributes:
        prepared: The calibrated network with fake-quant, for ``kind="static"``, once there is one.
        quantized: The int8 network, once there is one (a dict of them by name for several).
        fidelity: After a test of int8, its closeness to fake-quant, or to float where there is no fake-quant.
        float_source: Where the weights of the ``"float"`` variant come from, in words.

    Raises:
        ConfigurationError: A setting, or a pair of mode and backend, is not possible; at construction.

    Example:
        >>> ptq = PostTrainingQuantization(mode="fx", backend="x86", calibration_batches=16)
        >>> ptq.kind
        'static'
    """

    _IN_PLACE = "float"

    def __init__(
        self,
        mode: str = "fx",
        backend: str = "x86",
        module: str | list[str] | None = None,
        example_inputs: Any = None,
        scheme: Scheme | None = None,
        kind: PostTrainingKind = "static",
        calibration_batches: int = 32,
        calibration_dataloader: Any = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        equalization: Equalization = "none",
        bias_correction: bool = False,
        adaround: AdaRound | None = None,
        rehearse: bool = True,
        on_fault: OnFault = "leave_float",
        calls: Any = None,
    ) -> None:
        if not isinstance(kind, str) or kind not in get_args(PostTrainingKind):
            raise ConfigurationError(f"kind={kind!r} is unknown: use one of {', '.join(get_args(PostTrainingKind))}.")
        if type(calibration_batches) is not int or calibration_batches < 1:
            raise ConfigurationError(
                f"calibration_batches={calibration_batches!r} is not possible: give an int from 1."
            )
        self.kind = self._KIND = kind
        super().__init__(
            mode,
            backend,
            module,
            example_inputs,
            scheme,
            include,
            exclude,
            convert=True,
            equalization=equalization,
            rehearse=rehearse,
            on_fault=on_fault,
        )
        if mode != "auto":
            check_kind(self._recipe(mode))
        check_flag("bias_correction", bias_correction)
        if bias_correction and kind != "static":
            raise ConfigurationError(
                f"bias_correction=True needs data, which kind={kind!r} does without: use 'static'."
            )
        if adaround is not None and not isinstance(adaround, AdaRound):
            raise ConfigurationError(f"adaround={adaround!r} is not possible: give a qat_lightning.AdaRound, or None.")
        if adaround is not None and kind != "static":
            raise ConfigurationError(f"adaround= needs data, which kind={kind!r} does without: use 'static'.")
        if calls is not None and kind != "static":
            raise ConfigurationError(f"calls= are for kind='static'; kind={kind!r} calibrates nothing.")
        self.bias_correction = bias_correction
        self.calls = calls
        self._data = CalibrationSource(calibration_batches, calibration_dataloader, calls)
        self.adaround = adaround
        self.calibration_batches = calibration_batches
        self.calibration_dataloader = calibration_dataloader
        self.float_source = "the weights that were quantized"
        self._phase = _ROUNDING
        self._made_of: dict[str, dict[str, Tensor]] = {}
        self._unlogged = False

    # Life cycle

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be; the LightningModule stays as it is."""
        refuse_strategy(trainer)
        stop_recording_layers(trainer)
        if any(slot.pl_module is not pl_module for slot in self._slots.values()):
            self._slots, self._examples, self._prepared, self._quantized, self._made_of = {}, {}, {}, {}, {}
            self._decisions = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearse on a copy, so that a network that cannot be quantized does not cost a training."""
        self._find(trainer, pl_module, "fit")
        self._ensure_decided(trainer, "fit")
        if self.kind == "static" and not all(decision.rehearsal for decision in self._decisions.values()):
            for name, slot in self._slots.items():
                self._prepare_copy(name, slot)
        if self.kind == "static":
            self._data.try_it(trainer, pl_module, self._slots)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a fit that was resumed write checkpoints that can be resumed from in turn."""
        mend_resume(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, while the LightningModule is still on its device."""
        if has_trained(trainer):
            self._source = f"the fit that ended at step {trainer.global_step}"
            self._quantize(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the int8 network of what was trained."""
        if not self._made_of:
            return
        if self._simulated:
            rank_zero_warn(f"No int8 network is made: {self._simulated}. trainer.test runs fake-quant.")
            return
        self._convert_or_say(trainer, to_run=False)

    # Checkpoint: what was decided, so that a fit that goes on decides nothing anew

    def state_dict(self) -> dict[str, Any]:
        """What was decided of each network."""
        return {name: {"mode": d.mode, "left_float": dict(d.left_float)} for name, d in self._decisions.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self._decisions = {
            name: Decision(values["mode"], left_float=values["left_float"]) for name, values in state_dict.items()
        }

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside a fit, quantize what is there, and validate the chosen variant, by default fake-quant."""
        if trainer.state.fn == "validate":
            self._ensure(trainer, pl_module, "validate")
            self._stand_in("validate", trainer, pl_module)
            self._log_unlogged(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize what is there, and test the chosen variant, by default int8."""
        self._ensure(trainer, pl_module, "test")
        super().on_test_start(trainer, pl_module)
        self._log_unlogged(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize what is there, and predict with the chosen variant, by default int8."""
        self._ensure(trainer, pl_module, "predict")
        super().on_predict_start(trainer, pl_module)
        self._log_unlogged(trainer)

    def _log_unlogged(self, trainer: Trainer) -> None:
        """Log the settings of what no fit logged, once there is a network and its mode is chosen."""
        if self._unlogged:
            self._log_settings(trainer)
        self._unlogged = False

    # Quantize

    def _find(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._slots:
            return
        slots = {name: Slot(pl_module, name) for name in find_networks(pl_module, self.module)}
        trained = [name for name, slot in slots.items() if is_prepared(slot.get())]
        if trained:
            raise ConfigurationError(
                f"{trained[0]!r} holds fake-quant already, from QuantizationAwareTraining: use one of the two."
            )
        with isolate_rng(include_cuda=torch.cuda.is_initialized()):
            if self._user_example is None and self._data.has_calls:
                self._user_example = self._data.examples(list(slots))
            self._examples = self._find_examples(trainer, pl_module, slots, stage)
        self._slots = slots

    def _ensure(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Quantize the weights that are there now, unless that is what there is."""
        # Lightning evaluates in inference mode, whose tensors a prepared network cannot keep.
        with torch.inference_mode(False):
            self._quantize_if_other(trainer, pl_module, stage)

    def _quantize_if_other(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._find(trainer, pl_module, stage)
        if self._made_of and all(_has(slot.get(), self._made_of[name]) for name, slot in self._slots.items()):
            return
        self._source = f"checkpoint {trainer.ckpt_path}" if trainer.ckpt_path else "the present weights"
        self._quantize(trainer, pl_module)
        self._unlogged = trainer.state.fn != "fit"

    def _ensure_decided(self, trainer: Trainer, stage: str) -> None:
        """Decide on the networks of which nothing is decided yet, by a checkpoint or in a fit before."""
        new = {name: slot for name, slot in self._slots.items() if name not in self._decisions}
        if new:
            with isolate_rng(include_cuda=torch.cuda.is_initialized()):
                self._decisions |= self._decide_all(trainer, new, self._examples, stage)

    def _quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._made_of, self._quantized, self.fidelity = {}, {}, {}
        self._others_now()
        self._prepared = {}
        self._ensure_decided(trainer, str(trainer.state.fn))
        if self.kind == "static":
            if not self._data.has_calls:  # before anything is prepared: it may be missing
                calibration_loader(trainer, pl_module, self.calibration_dataloader)
            prepared = {name: self._prepare_copy(name, slot) for name, slot in self._slots.items()}
            self._say_what_was_done(prepared)
            for network in prepared.values():
                network.to(pl_module.device)
            count = self._data.calibrate(trainer, pl_module, self._slots, prepared)
            rank_zero_info(f"Calibrated on {count} batches.")
            if self.bias_correction or self.adaround is not None:
                self._win_back(trainer, pl_module, prepared)
            if trainer.world_size > 1:
                take_over_from_first(prepared)
            self._prepared = prepared
            if wandb_loggers(trainer):
                rows = [row for name in prepared for row in self._coverage(name)]
                log_coverage(trainer, "quant/coverage_prepared", rows)
        self._made_of = {name: _weights(slot.get()) for name, slot in self._slots.items()}

    def _win_back(self, trainer: Trainer, pl_module: LightningModule, prepared: dict[str, nn.Module]) -> None:
        """Learned rounding and corrected biases, on the batches of the calibration."""
        calls = self._data.calls(trainer, pl_module, self._slots, prepared)
        for name, network in prepared.items():
            before = float_weights(network)
            if self.adaround is not None:
                learn_rounding(network, calls[name], self.adaround, progress=_say_progress)
            if self.bias_correction:
                corrected = correct_biases(network, calls[name], before)
                rank_zero_info(f"{name!r}: the biases of {len(corrected)} layers were corrected.")

    def _prepare_copy(self, name: str, slot: Slot) -> nn.Module:
        return self._prepare_one(slot, copy.deepcopy(slot.get()), self._examples[name])

    def _make_int8(self, name: str) -> tuple[Conversion, Recipe]:
        if self.kind == "static":
            return super()._make_int8(name)
        slot, example, network = self._slots[name], self._examples[name], self._float_network(name)
        decision = self._decisions[name]
        self._rework(network, slot, example)
        recipe = leaving_float(self._recipe(decision.mode), decision.left_float, slot.prefix)
        conversion = quantize_what_can_be(network, example, recipe, prefix=slot.prefix)
        return conversion, leaving_float(recipe, conversion.left_float, slot.prefix)

    @property
    def coverage(self) -> Any:
        """Of kinds that prepare nothing, what conversion made integer; otherwise what it is going to make."""
        if self.kind == "static":
            return super().coverage
        return one_or_all({name: list(quantized.coverage) for name, quantized in self._quantized.items()})

    # Variants

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that can be evaluated now."""
        if not self._made_of:
            return ()
        names = ("float", "fake_quant", "int8") if self.kind == "static" else ("float", "int8")
        return tuple(name for name in names if name != "int8" or not (self._simulated or self._impossible))

    @property
    def _convertible(self) -> bool:
        return bool(self._made_of) and not self._simulated

    def _ranges_seen(self) -> bool:
        return bool(self._prepared)

    def _default_variant(self, stage: str) -> str:
        return super()._default_variant(stage) if self.kind == "static" else "int8"

    def _variant(self, name: str, variant: str) -> nn.Module:
        return self._prepared[name]

    def _reference(self, name: str, pl_module: LightningModule) -> nn.Module | None:
        return self._prepared.get(name)

    def _untrained(self, name: str) -> nn.Module:
        return self._float_network(name)

    def present_float(self, slot: str) -> nn.Module:
        """See `QuantizationCallback.present_float`."""
        return self._float_network(slot)

    def comparable(self, slot: str) -> nn.Module:
        """See `QuantizationCallback.comparable`; the kinds without calibration are compared with float."""
        return super().comparable(slot) if slot in self._prepared else self._float_network(slot)

    def _float_network(self, name: str) -> nn.Module:
        return copy.deepcopy(self._slots[name].get()).cpu().float().eval()

    def _why_not(self, name: str) -> str:
        if not self._made_of:
            return "nothing was quantized with this callback yet."
        return f"{self._simulated or self._impossible}." if name == "int8" else f"kind={self.kind!r} has none."


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in network.state_dict().items() if isinstance(value, Tensor)}


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.cpu().clone() for key, value in _tensors(network).items()}


def _has(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    now = _tensors(network)
    return now.keys() == weights.keys() and all(torch.equal(now[key].cpu(), weights[key]) for key in now)


def _say_progress(number: int, layers: int, name: str, result: Reconstruction) -> None:
    rank_zero_info(
        f"AdaRound, layer {number} of {layers}, {name}: error {result.nearest:.2e} with the nearest points, "
        f"{result.learned:.2e} now."
    )
