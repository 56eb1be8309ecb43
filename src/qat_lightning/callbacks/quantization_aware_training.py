"""The callback for quantization-aware training: prepares, follows the schedule, and converts when the fit ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from qat_lightning.callbacks.parts.arguments import check_file, check_flag, check_stages
from qat_lightning.callbacks.parts.best import BestCheckpoints
from qat_lightning.callbacks.parts.between_processes import (
    copy_buffers_from_first_process,
    reduce_ranges_while_observed,
    synchronize_processes,
)
from qat_lightning.callbacks.parts.compiled_training import CompiledTraining
from qat_lightning.callbacks.parts.coverage_report import report_prepared
from qat_lightning.callbacks.parts.float_weights import FloatWeights
from qat_lightning.callbacks.parts.learned import check_optimized, reduce_gradients
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.callbacks.parts.nonfinite import NonFiniteReport
from qat_lightning.callbacks.parts.placement import Placement
from qat_lightning.callbacks.parts.preparation import Preparation
from qat_lightning.callbacks.parts.recipes_in_fit import apply_recipes_in_fit, counts_of_recipes, refuse_without_ranges
from qat_lightning.callbacks.parts.schedule_driver import ScheduleDriver, curves
from qat_lightning.callbacks.parts.settings import QuantizationSettings
from qat_lightning.callbacks.parts.settings_log import log_settings
from qat_lightning.callbacks.parts.sharding import refuse_sharded, shards
from qat_lightning.callbacks.parts.steps import estimates_batchnorm, has_trained
from qat_lightning.callbacks.parts.together import (
    evaluate_average,
    explain_launch,
    refuse_callbacks,
    refuse_in_processes,
    refuse_strategy,
    repair_resume,
    report_interruption,
    stop_recording_layers,
)
from qat_lightning.callbacks.parts.variant_source import TrainedVariants
from qat_lightning.callbacks.quantization_callback import QuantizationCallback
from qat_lightning.errors import ConfigurationError
from qat_lightning.modes.compiling import check_compiler
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.recipes.sequential_mse import clipping
from qat_lightning.rehearsal.rehearse import OnFault
from qat_lightning.settings.kinds import check_kind
from qat_lightning.settings.recipe import Adapters, BatchNormHandling, Equalization, Kind
from qat_lightning.settings.runtimes import Runtime
from qat_lightning.settings.schedule import Phase, PointLike, QuantizationSchedule
from qat_lightning.settings.scheme import Scheme
from qat_lightning.storage import Place

TrainedKind = Literal["static", "dynamic", "weight_only"]
"""The kinds of quantization that a network can be trained for."""


def kind_of_training(kind: str) -> Kind:
    """Return the recipe's name for a kind that is trained.

    Raises:
        ConfigurationError: The kind is unknown.
    """
    if kind not in get_args(TrainedKind):
        raise ConfigurationError(f"kind={kind!r} is unknown: use one of {', '.join(get_args(TrainedKind))}.")
    return "qat" if kind == "static" else cast("Kind", kind)


class QuantizationAwareTraining(QuantizationCallback):
    """Trains the network of a LightningModule with fake-quantization and converts it to int8.

    When the fit begins, observers and fake-quantization are inserted. Observers run from the first step; at ``start``
    fake-quantization is enabled; at the two freezes ranges and BatchNorm statistics stop moving. When the fit ends, a
    copy on the CPU is converted to int8. ``trainer.validate`` runs fake-quantization, ``trainer.test`` and
    ``trainer.predict`` the int8 network.

    Args:
        mode: ``"fx"``, ``"eager"``, ``"pt2e"``, ``"parts"``, or ``"auto"`` for the best that supports this network.
        backend: ``"x86"``, ``"fbgemm"``, ``"onednn"`` or ``"qnnpack"`` in eager, fx and parts; ``"x86"``,
            ``"xnnpack"``, ``"tensorrt"``, ``"openvino"``, ``"tosa"``, ``"ethosu"``, ``"vgf"``, ``"cortex_m"`` or
            ``"vulkan"`` in pt2e. In pt2e also any PT2E ``Quantizer``: a dotted path (``"package.module.Class"``,
            or a function that returns one), a class or a function, a mapping (``{"_target_":
            "package.module.Class", "bits": 8}``), or an instance, of which checkpoints store only the class.
        module: Dotted name of the network in the LightningModule, or a list of names, or ``"."`` for the
            LightningModule's own ``forward``. None finds it if there is only one candidate. A Trainer takes one
            callback of this class: for several networks give it a list.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs of the network's ``forward``,
            with a batch dimension. By default ``example_input_array``, or taken from a real batch.
        scheme: Bits and granularity.
        kind: ``"static"``: fixed ranges of activations; ``"dynamic"``: ranges are computed in each call, per tensor or
            per token; ``"weight_only"``: integer weights, float activations. With the last two your own ``forward``
            trains in every mode; the mode only affects the int8 network.
        start: When to enable fake-quantization: an epoch (int), a share of the planned training (float), or
            ``{"epoch": n}``, ``{"step": n}``, ``{"fraction": f}``.
        freeze_observers: When activation ranges stop moving; None for never.
        freeze_batchnorm: When BatchNorm statistics stop moving; None for never.
        include: Globs of module names, relative to the LightningModule; only these are quantized.
        exclude: Globs of module names that stay float.
        convert_on_fit_end: Convert to int8 when the fit ends. If False, tests run fake-quantization.
        float_checkpoint: A checkpoint of a float run, whose weights become the ``"float"`` variant to compare
            with, instead of the weights from when fake-quantization was enabled.
        reset_best_on_start: Reset ``ModelCheckpoint`` and ``EarlyStopping`` when fake-quantization is enabled, so that
            a checkpoint of the float phase is not the best.
        observe_stages: Stages in which ranges move until they freeze: ``"train"``, and optionally ``"validate"``, and
            ``"test"`` and ``"predict"`` where these run fake-quantization. BatchNorm statistics move in training only.
        equalization: Equalize the weight ranges of neighbouring layers before preparing: ``"exact"`` where the outputs
            stay the same, ``"replace_relu6"`` also across ReLU6, which is replaced by ReLU.
        smoothquant: Move the outliers of activations into the weights that read them, before preparing; the outputs
            stay the same. The share that moves, from 0 to 1, such as 0.5; None for off. For transformers, with static
            or dynamic ranges, from trained weights.
        rotation: Rotate the channels of the residual stream and of attention values by Hadamard matrices before
            preparing: outliers are spread over all channels, and the outputs stay the same. For transformers, from
            trained weights; most useful at 4 bits.
        batchnorm: ``"fused"``: BatchNorm continues to train, and weights are rounded as they will be with it folded in.
            ``"fold"``: it is folded into the weights before training, which makes steps cheaper; for trained networks.
        bias_correction_batches: When fake-quantization is enabled, correct the biases for the shift of the mean that
            rounded weights cause, measured on this many batches of the training loader; 0 for off. For short
            fine-tuning of trained networks, with one scale per tensor or few bits.
        compile: Compile the training steps with ``torch.compile``, in one graph between two switches of the schedule.
            Evaluation and conversion run uncompiled.
        rehearse: Before the first step, try the whole path to the int8 file on a copy: prepare, calibrate on one batch,
            convert, verify, save and load. It takes two to five times as long as preparing, and raises errors before
            training that would otherwise come after it.
        on_fault: What to do with a layer or op that cannot be int8: ``"leave_float"`` leaves it float, reports it in
            the coverage and a warning, and converts the rest; ``"error"`` refuses the training. A fault that appears
            only with trained weights always leaves the layer float.
        adapters: How to treat peft's LoRA in kinds ``"dynamic"`` and ``"weight_only"``. ``"merged"``: the frozen weight
            plus its adapters is rounded in training, and stored as one integer layer without adapters. ``"float"``:
            the frozen weight is rounded, and the adapters stay float beside it, as in QLoRA.
        learn_scales: When learned scales (``Scheme(learned_step=…)``) start to learn, a point like ``start``. Until
            then they follow weights and batches, as fixed scales do. None: when fake-quantization is enabled.
        runtime: What runs the int8 network in this process. None: the fastest there is for the mode. ``"plain"``:
            oneDNN's ops on plain uint8 and int8 tensors, without a compiler and without the dtypes that torch
            deprecates (``quint8``, ``qint8``, ``qint32``); for backends ``"x86"`` and ``"onednn"``. The int8 network
            and its file are then of mode ``"pt2e"``.
        sequential_mse_batches: When fake-quantization is enabled, choose the range of each weight by the error of its
            layer's output, layer by layer, on this many batches of the training loader; 0 for off.

    Attributes:
        prepared: The prepared network (a dict by name, if ``module`` lists several), once the fit has begun.
        quantized: The int8 network (likewise), once there is one.
        float_source: Where the weights of the ``"float"`` variant come from; empty if there is none.
        float_step: The step before which they were taken; None if they come from elsewhere.
        fidelity: After a test of the int8 network, its agreement with fake-quant: ``agreement`` and ``sqnr_db``.

    Raises:
        ConfigurationError: A setting, or a combination of mode and backend, is not supported; at construction.

    Example:
        >>> qat = QuantizationAwareTraining(mode="fx", backend="x86", start=0.3, freeze_observers=0.7)
        >>> qat.schedule.start
        SchedulePoint(unit='fraction', at=0.3)
    """

    def __init__(
        self,
        mode: str = "fx",
        backend: Any = "x86",
        module: str | list[str] | None = None,
        example_inputs: Any = None,
        scheme: Scheme | None = None,
        start: PointLike = 0,
        freeze_observers: PointLike = None,
        freeze_batchnorm: PointLike = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        convert_on_fit_end: bool = True,
        float_checkpoint: str | Path | None = None,
        reset_best_on_start: bool = False,
        observe_stages: Sequence[str] = ("train",),
        equalization: Equalization = "none",
        batchnorm: BatchNormHandling = "fused",
        bias_correction_batches: int = 0,
        compile: bool = False,
        rehearse: bool = True,
        on_fault: OnFault = "leave_float",
        kind: TrainedKind = "static",
        smoothquant: float | None = None,
        adapters: Adapters = "merged",
        rotation: bool = False,
        learn_scales: PointLike = None,
        runtime: Runtime | None = None,
        sequential_mse_batches: int = 0,
    ) -> None:
        self._in_fit = counts_of_recipes(
            sequential_mse_batches=sequential_mse_batches, bias_correction_batches=bias_correction_batches
        )
        if sequential_mse_batches:
            scheme = clipping(scheme)
        settings = QuantizationSettings(
            mode,
            backend,
            kind_of_training(kind),
            module,
            example_inputs,
            scheme,
            include,
            exclude,
            equalization,
            batchnorm,
            rehearse,
            on_fault,
            convert_on_fit_end,
            trained=kind != "static",
            smoothquant=smoothquant,
            adapters=adapters,
            rotation=rotation,
            runtime=runtime,
        )
        if mode != "auto":
            check_kind(settings.recipe)
        refuse_without_ranges(kind, self._in_fit)
        if learn_scales is not None and not settings.recipe.scheme.learned:
            raise ConfigurationError(
                f"learn_scales={learn_scales!r} sets when scales start to learn, and no scale is learned: give "
                "scheme=Scheme(learned_step='lsq'), or leave it out."
            )
        networks = Networks(settings)
        schedule = QuantizationSchedule(start, freeze_observers, freeze_batchnorm, learn_scales)
        self._driver = ScheduleDriver(schedule)
        floats = FloatWeights(networks, check_file("float_checkpoint", float_checkpoint))
        check_flag("reset_best_on_start", reset_best_on_start)
        self.reset_best_on_start = reset_best_on_start
        self._best = BestCheckpoints(reset=reset_best_on_start)
        self.bias_correction_batches = bias_correction_batches
        self.sequential_mse_batches = sequential_mse_batches
        check_flag("compile", compile)
        self.compile = compile
        super().__init__(networks, TrainedVariants(networks, floats), floats)
        self.observe_stages = check_stages("observe_stages", observe_stages)
        self._placement = Placement(networks, Preparation(networks, floats), floats)
        self._compiled = CompiledTraining(networks)
        networks.compiled = compile
        self._nonfinite = NonFiniteReport()

    @property
    def kind(self) -> TrainedKind:
        """The kind of quantization that the network is trained for."""
        kind = self.settings.kind
        return "static" if kind == "qat" else kind

    @property
    def schedule(self) -> QuantizationSchedule:
        """When fake-quantization is enabled, and when ranges and statistics are frozen."""
        return self._driver.schedule

    @property
    def float_checkpoint(self) -> Place | None:
        """Where the weights of the ``"float"`` variant are read from, if not kept in the fit."""
        return self._floats.checkpoint

    @property
    def float_source(self) -> str:
        """Where the weights of the ``"float"`` variant come from, in words; empty if there is none."""
        return self._floats.source

    @property
    def float_step(self) -> int | None:
        """The step before which they were taken; None if from elsewhere."""
        return self._floats.step

    # Prepare

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the combination of settings and Trainer, and schedule the preparation."""
        if trainer.world_size > 1:
            refuse_in_processes(self.settings, self.observe_stages)
        if self.compile and stage == "fit":
            check_compiler(trainer.strategy.root_device)
        refuse_strategy(trainer)
        refuse_sharded(trainer, self.settings, self._in_fit)
        stop_recording_layers(trainer)
        evaluate_average(trainer, stage)
        refuse_callbacks(trainer, self, self.mode)
        if stage == "fit":
            self._driver.new_fit(trainer)
        self._clean_up()
        self._placement.arrange(trainer, pl_module, stage, prepared=self._was_prepared, loaded=self._was_loaded)

    def _was_prepared(self) -> None:
        self._int8.forget()
        self._driver.new_networks = True
        self._int8.made_from, self.fidelity = "the current weights", {}

    def _was_loaded(self, source: str) -> None:
        self._int8.outdate()
        self._int8.made_from = source

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reset the optimizer if a float checkpoint has other parameters than those that train."""
        self._placement.renew_optimizer(checkpoint)
        if shards(trainer):  # it was loaded in parts, without the LightningModule's load hooks
            self._was_loaded(f"checkpoint {trainer.ckpt_path}")

    # Train

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that learned scales are optimized, and log the settings, so that runs can be told apart."""
        check_optimized(trainer, self._networks.prepared)
        log_settings(trainer, self, list(self.chosen_modes.values()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Reduce the gradients of learned scales, which are kept from DistributedDataParallel."""
        if self.scheme.learned and trainer.world_size > 1 and self.phase.fake_quant:
            reduce_gradients(self._networks.prepared)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Determine the planned length of training."""
        repair_resume(trainer)
        self._driver.begin(trainer, self.phase)
        self._int8.outdate()
        self._int8.made_from = "the current weights"
        reduce_ranges_while_observed(self._networks.prepared, trainer.world_size)
        with self._networks.whole(everywhere=False):
            if trainer.is_global_zero:
                recipes = [prepared_state(network).recipe for network in self._networks.prepared.values()]
                report_prepared(trainer, self._networks.coverage_rows(), recipes)
        self._step_phase(trainer)
        if self.compile:
            self._compiled.begin(pl_module)  # last, so that nothing copies a compiled network

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch before the epoch's first batch."""
        self._step_phase(trainer)
        # Set again, in case other code changed the flags since.
        self._apply(self.phase)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch before the optimizer step of a schedule point, and log what is enabled."""
        self._step_phase(trainer)
        self._driver.before_batch(trainer, self._networks.prepared, self.phase)
        if estimates_batchnorm(trainer) and self.phase.batchnorm_frozen:
            # Stochastic weight averaging estimates statistics in a pass of its own, where they are always updated.
            self._compiled.switched()
            self._networks.let_batchnorm_move()
        self._networks.in_training_step(True)
        if not trainer.barebones:
            pl_module.log_dict(curves(self.phase), on_step=True, on_epoch=False, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of non-finite activations; once per epoch, because it synchronizes with the device."""
        self._nonfinite.look(self._networks.prepared)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give all processes the same ranges and statistics, and mark int8 networks of an earlier fit as stale."""
        self._driver.after_batch()
        self._networks.in_training_step(False)
        self._int8.outdate()
        if trainer.world_size > 1:
            synchronize_processes(self._networks.prepared, ranges=self.phase.observers)

    def _step_phase(self, trainer: Trainer) -> None:
        if estimates_batchnorm(trainer):
            return  # training is over, and a point that it did not reach stays so
        step, phase = self._driver.phase(trainer, self._networks.prepared)
        phase = phase.latched(self.phase)
        comes_on = phase.fake_quant and not self.phase.fake_quant
        if comes_on:
            self._on_fake_quantize_enabled(trainer, step)
        if phase.batchnorm_frozen and not self.phase.batchnorm_frozen:
            self._driver.freeze_batchnorm(trainer, self._networks.prepared, step)
        if phase != self.phase:
            self._apply(phase)
        if comes_on and self._in_fit:
            with self._compiled.paused(trainer.lightning_module):
                apply_recipes_in_fit(trainer, self._networks, self._in_fit)

    def _on_fake_quantize_enabled(self, trainer: Trainer, step: int) -> None:
        if step > 0 or self._in_fit:  # otherwise the weights are those from the beginning of the fit
            if trainer.world_size > 1:  # each process has its own BatchNorm statistics until the next step
                copy_buffers_from_first_process(self._networks.prepared)
            self._floats.keep(step)
        if step > 0:
            self._best.begin(trainer)

    def _apply(self, phase: Phase) -> None:
        if phase != self.phase:
            self._compiled.switched()
        self._networks.apply(phase)

    # Convert

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Broadcast the first process's ranges and statistics, which checkpoints store."""
        self._compiled.end()
        self._driver.end()
        self._apply(self.phase)
        if trainer.world_size > 1:
            copy_buffers_from_first_process(self._networks.prepared)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the int8 network from the trained weights."""
        if not self._networks.prepared or not has_trained(trainer):
            return
        self._int8.end_fit(f"the fit that ended at step {trainer.global_step}")
        if not self.convert_on_fit_end:
            return
        if not self._networks.know_a_range():
            rank_zero_warn(self._driver.why_no_range())
            return
        if self._networks.simulated:
            rank_zero_warn(
                f"There is no int8 network: {self._networks.simulated}. The scheme is simulated: trainer.test runs "
                "fake-quantization."
            )
            return
        self._best.report(trainer, self.schedule.start)
        if not self.phase.fake_quant and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"The fit ended at step {trainer.global_step} before fake-quantization was enabled "
                f"(start={self.schedule.start}), so the int8 network was not trained for its grid. Train longer, or "
                "use an earlier start."
            )
        self._int8.convert_or_say(trainer, to_run=False)

    # Evaluate

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside a fit, validate the chosen variant, by default fake-quant."""
        if trainer.state.fn == "validate":
            self._switch.stand_in("validate", trainer, pl_module)
        elif not trainer.sanity_checking:
            self._switch.observe("validate")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Convert again what hooks of the stage have changed."""
        self._switch.see(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the prepared network."""
        self._switch.stand_back()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the chosen variant, by default int8."""
        self._switch.stand_in("test", trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the labels of the batch into account; convert again what hooks of the stage have changed."""
        self._switch.see(batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the prepared network, keep the agreement with fake-quant, and log the variant's metrics."""
        self._switch.end_test(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict with the chosen variant, by default int8."""
        self._switch.stand_in("predict", trainer, pl_module)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Convert again what hooks of the stage have changed."""
        self._switch.see(batch)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the prepared network."""
        self._switch.stand_back()

    # Checkpoint: tensors and plain values only, which torch.load(weights_only=True) takes

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule, and the float weights to compare with."""
        phase = dataclasses.asdict(self.phase)
        parts = self._floats.state_dict() | self._best.state_dict()
        return {"phase": phase, **parts, "schedule": self._driver.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._driver.load_state_dict(state_dict.get("schedule", {}))
        self._floats.load_state_dict(state_dict)
        self._best.load_state_dict(state_dict)
        self._apply(Phase(**state_dict["phase"]))

    # End

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the state of the fit and places of non-finite activations, a possible cause; clean up."""
        self._switch.stand_back()
        self._clean_up()
        explain_launch(trainer, exception)
        self._networks.in_training_step(False)
        self._nonfinite.look(self._networks.prepared)
        if trainer.state.fn == "fit" and self._networks.prepared and trainer.global_step:
            report_interruption(trainer, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks and patched methods; the prepared network stays."""
        self._switch.stand_back()
        self._clean_up()

    def _clean_up(self) -> None:
        self._compiled.end()
        self._driver.end()
        self._placement.leave_nothing()
