"""The callback for post-training quantization: int8 from a float network, with a few calibration batches or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from qat_lightning.callbacks.parts.calibrated_copies import CalibratedCopies, CalibrationSettings, PostTrainingKind
from qat_lightning.callbacks.parts.float_weights import FloatWeights
from qat_lightning.callbacks.parts.networks import Networks, one_or_all
from qat_lightning.callbacks.parts.preparation import Preparation
from qat_lightning.callbacks.parts.settings import QuantizationSettings, Setting
from qat_lightning.callbacks.parts.settings_log import log_settings
from qat_lightning.callbacks.parts.sharding import refuse_copying
from qat_lightning.callbacks.parts.steps import has_trained
from qat_lightning.callbacks.parts.together import (
    evaluate_average,
    explain_launch,
    refuse_strategy,
    repair_resume,
    stop_recording_layers,
)
from qat_lightning.callbacks.parts.variant_source import CalibratedVariants
from qat_lightning.callbacks.quantization_callback import QuantizationCallback
from qat_lightning.modes.coverage import under
from qat_lightning.recipes.adaround import AdaRound
from qat_lightning.recipes.sequential_mse import clipping
from qat_lightning.rehearsal.auto import Decision
from qat_lightning.rehearsal.rehearse import OnFault
from qat_lightning.settings.kinds import check_kind
from qat_lightning.settings.recipe import Equalization
from qat_lightning.settings.runtimes import Runtime
from qat_lightning.settings.schedule import Phase
from qat_lightning.settings.scheme import Scheme

_ROUNDING = Phase(fake_quant=True, observers=False, batchnorm_frozen=True)


class PostTrainingQuantization(QuantizationCallback):
    """Quantizes the network of a LightningModule without training.

    The LightningModule keeps its float network, and checkpoints are those of a float run. After a fit, or before
    ``validate``, ``test`` or ``predict`` of a Trainer that did not fit, a copy of the network is calibrated and
    converted. This is repeated whenever the weights have changed, so ``ckpt_path=`` of any float run works.
    ``trainer.validate`` then runs fake-quantization, ``trainer.test`` and ``trainer.predict`` int8; validation during a
    fit runs float.

    Args:
        mode: ``"fx"``, ``"eager"``, ``"pt2e"``, ``"parts"``, or ``"auto"``.
        backend: As for `QuantizationAwareTraining`.
        module: As for `QuantizationAwareTraining`.
        example_inputs: As for `QuantizationAwareTraining`.
        scheme: Bits, granularity and observers.
        kind: ``"static"``: ranges of activations from ``calibration_batches``; ``"dynamic"``: ranges are computed in
            each call; ``"weight_only"``: integer weights, float activations.
        calibration_batches: Number of calibration batches, for ``kind="static"``.
        calibration_dataloader: Where they come from; by default the training loader. They go through ``training_step``
            in evaluation mode, or through ``validation_step`` where that does not call the network.
        calls: Inputs of the network to calibrate with instead, each a tensor, a tuple or a dict (for several networks a
            dict of such lists by name): for a LightningModule whose steps do not call the network in evaluation mode.
        include: Globs of module names, relative to the LightningModule; only these are quantized.
        exclude: Globs of module names that stay float.
        equalization: As for `QuantizationAwareTraining`.
        smoothquant: As for `QuantizationAwareTraining`.
        rotation: As for `QuantizationAwareTraining`.
        runtime: As for `QuantizationAwareTraining`.
        bias_correction: Correct the biases for the mean error of rounded weights, on the calibration batches.
        adaround: Learn for each weight whether it is rounded up or down, on the same batches; None for rounding to
            nearest.
        sequential_mse: Choose the range of each weight by the error of its layer's output on the same batches, layer by
            layer, before the other recipes.
        rehearse: As for `QuantizationAwareTraining`; without a fit it comes before the calibration.
        on_fault: As for `QuantizationAwareTraining`.

    Attributes:
        prepared: The calibrated network with fake-quantization, for ``kind="static"``, once there is one.
        quantized: The int8 network, once there is one (a dict of them by name for several).
        fidelity: After a test of int8, its agreement with fake-quant, or with float where there is no fake-quant.
        float_source: Where the weights of the ``"float"`` variant come from.

    Raises:
        ConfigurationError: A setting, or a combination of mode and backend, is not supported; at construction.

    Example:
        >>> ptq = PostTrainingQuantization(mode="fx", backend="x86", calibration_batches=16)
        >>> ptq.kind
        'static'
    """

    calibration_batches = Setting[int]("_copies")
    calibration_dataloader = Setting[Any]("_copies")
    calls = Setting[Any]("_copies")
    bias_correction = Setting[bool]("_copies")
    adaround = Setting[AdaRound | None]("_copies")
    sequential_mse = Setting[bool]("_copies")

    def __init__(
        self,
        mode: str = "fx",
        backend: Any = "x86",
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
        smoothquant: float | None = None,
        rotation: bool = False,
        runtime: Runtime | None = None,
        sequential_mse: bool = False,
    ) -> None:
        calibration = CalibrationSettings(
            kind, calibration_batches, calibration_dataloader, calls, bias_correction, adaround, sequential_mse
        )
        if sequential_mse:
            scheme = clipping(scheme)
        settings = QuantizationSettings(
            mode,
            backend,
            kind,
            module,
            example_inputs,
            scheme,
            include,
            exclude,
            equalization,
            rehearse=rehearse,
            on_fault=on_fault,
            smoothquant=smoothquant,
            rotation=rotation,
            runtime=runtime,
        )
        if mode != "auto":
            check_kind(settings.recipe)
        networks = Networks(settings, _ROUNDING)
        self._copies = CalibratedCopies(networks, Preparation(networks), calibration)
        super().__init__(networks, CalibratedVariants(networks, self._copies), FloatWeights(networks))
        self.float_source = "the weights that were quantized"
        self._unlogged = False

    @property
    def kind(self) -> PostTrainingKind:
        """The kind of quantization."""
        return self._copies.settings.kind

    @property
    def coverage(self) -> Any:
        """Rows of what conversion makes int8; for kinds without preparation, of what it has made."""
        if self._copies.calibrates:
            return super().coverage
        return one_or_all(
            {
                name: under(self._networks.slots[name].prefix, quantized.coverage)
                for name, quantized in self._int8.named().items()
            }
        )

    # Fit: rehearse before it, quantize after it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the combination of settings and Trainer; the LightningModule is not changed."""
        refuse_strategy(trainer)
        refuse_copying(trainer)
        stop_recording_layers(trainer)
        evaluate_average(trainer, stage)
        if self._copies.forget_others(pl_module):
            self._int8.forget(asked=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearse on a copy, so that a network that cannot be quantized is reported before training."""
        self._copies.try_before_fit(trainer, pl_module)
        self._log_settings(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a resumed fit write checkpoints that can be resumed from exactly."""
        repair_resume(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, while the LightningModule is still on its device."""
        if not has_trained(trainer):
            return
        try:
            self._quantize(trainer, pl_module, f"the fit that ended at step {trainer.global_step}")
        except Exception as error:  # noqa: BLE001 - the fit has finished; any failure is only reported
            self._int8.give_up(
                error,
                "The trained network and its checkpoints are unaffected. To try other settings without training: "
                "Trainer(callbacks=[<the callback with them>]).test(model, ...).",
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the int8 network from the trained weights."""
        if not self._copies.made_of:
            return
        if not self._copies.are_present():
            rank_zero_warn(
                "The weights changed after they were quantized, when training ended, and are quantized again. A "
                "callback that averages or changes them then belongs before PostTrainingQuantization in the Trainer's "
                "callbacks."
            )
            self._quantize(trainer, pl_module, self._int8.made_from)
        if self._networks.simulated:
            rank_zero_warn(
                f"There is no int8 network: {self._networks.simulated}. trainer.test runs fake-quantization."
            )
            return
        self._int8.convert_or_say(trainer, to_run=False)

    def _quantize(self, trainer: Trainer, pl_module: LightningModule, made_from: str) -> None:
        self._int8.forget(asked=False)
        self._int8.made_from, self.fidelity = made_from, {}
        self._copies.make(trainer, pl_module)

    # Evaluate: quantize the present network first, unless that is done

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside a fit, quantize the present network, and validate the chosen variant, by default fake-quant."""
        if trainer.state.fn == "validate":
            self._evaluate("validate", trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Quantize again what hooks of the stage have changed."""
        self._before_batch("validate", trainer, pl_module, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the float network."""
        self._switch.stand_back()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the present network, and test the chosen variant, by default int8."""
        self._evaluate("test", trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the labels of the batch into account; quantize again what hooks of the stage have changed."""
        self._before_batch("test", trainer, pl_module, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the float network, keep the agreement with fake-quant, and log the variant's metrics."""
        self._switch.end_test(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the present network, and predict with the chosen variant, by default int8."""
        self._evaluate("predict", trainer, pl_module)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Quantize again what hooks of the stage have changed."""
        self._before_batch("predict", trainer, pl_module, batch)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the float network."""
        self._switch.stand_back()

    def _evaluate(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning evaluates in inference mode, whose tensors a prepared network cannot keep.
        with torch.inference_mode(False):
            self._copies.find(trainer, pl_module, stage)
            if not self._copies.are_present():
                found = f"checkpoint {trainer.ckpt_path}" if trainer.ckpt_path else "the current weights"
                self._quantize(trainer, pl_module, found)
                self._unlogged = trainer.state.fn != "fit"
        self._switch.stand_in(stage, trainer, pl_module)
        if self._unlogged:  # no fit has logged them; the mode is known now
            self._log_settings(trainer)
        self._unlogged = False

    def _before_batch(self, stage: str, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if self._switch.begins and not self._copies.are_present():
            self._switch.stand_back()
            self._evaluate(stage, trainer, pl_module)
        self._switch.see(batch)

    def _log_settings(self, trainer: Trainer) -> None:
        log_settings(trainer, self, list(self.chosen_modes.values()))

    # Checkpoint: earlier decisions, so that a resumed fit does not decide again

    def state_dict(self) -> dict[str, Any]:
        """Return the decision about each network."""
        settings, decisions = self._networks.settings, self._networks.decisions
        return {
            name: {"mode": d.mode, "left_float": dict(d.left_float), "recipe": settings.recipe_for(d.mode).to_dict()}
            for name, d in decisions.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the decisions that `state_dict` returned, if they were made for the same settings."""
        settings = self._networks.settings
        self._networks.decisions = {
            name: Decision(values["mode"], left_float=values["left_float"])
            for name, values in state_dict.items()
            if settings.decides_like(values["mode"], values.get("recipe"))
        }

    # End

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the float network after an exception, because ``teardown`` is not called then."""
        self._switch.stand_back()
        explain_launch(trainer, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the float network."""
        self._switch.stand_back()
