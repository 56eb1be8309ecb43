"""The callback: fake-quant in at the beginning of the fit, schedule, int8 at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from qat_lightning.callbacks.parts.arguments import check_count, check_file, check_flag, check_stages
from qat_lightning.callbacks.parts.best import forget_best
from qat_lightning.callbacks.parts.between_processes import take_over_from_first
from qat_lightning.callbacks.parts.calibration_data import calibration_loader, calls_in_steps
from qat_lightning.callbacks.parts.checkpoint_io import read_float_state
from qat_lightning.callbacks.parts.checkpoints import read_float_weights
from qat_lightning.callbacks.parts.coverage_report import log_coverage, warn_of_float
from qat_lightning.callbacks.parts.learned import check_optimized, keep_from_ddp, reduce_gradients
from qat_lightning.callbacks.parts.network import OWN_FORWARD, Slot
from qat_lightning.callbacks.parts.nonfinite import NonFiniteReport
from qat_lightning.callbacks.parts.schedule_driver import ScheduleDriver, curves
from qat_lightning.callbacks.parts.steps import estimates_batchnorm, has_trained
from qat_lightning.callbacks.parts.together import mend_resume
from qat_lightning.callbacks.quantization_callback import QuantizationCallback
from qat_lightning.errors import ConfigurationError
from qat_lightning.modes.compiling import CompiledSteps, check_compiler
from qat_lightning.modes.float_state import float_weights
from qat_lightning.modes.prepared import in_training_step, merge_ranges, prepared_state, reduce_ranges, set_phase
from qat_lightning.recipes.bias_correction import correct_biases
from qat_lightning.rehearsal.rehearse import OnFault
from qat_lightning.settings.recipe import BatchNormHandling, Equalization
from qat_lightning.settings.schedule import Phase, PointLike, QuantizationSchedule
from qat_lightning.settings.scheme import Scheme


class QuantizationAwareTraining(QuantizationCallback):
    """Trains the network of a LightningModule with fake-quant and converts it to int8.

    When the fit begins, fake-quantize modules go into the network (observers run from the first step), at ``start``
    rounding comes on, at the two freezes ranges and BatchNorm statistics stop, and at the end of the fit a copy on the
    CPU becomes int8. ``trainer.validate`` then runs fake-quant, ``trainer.test`` and ``trainer.predict`` the int8
    network.

    Args:
        mode: ``"fx"``, ``"eager"``, ``"pt2e"``, or ``"auto"`` for the best that works for this network.
        backend: ``"x86"``, ``"fbgemm"``, ``"onednn"`` or ``"qnnpack"`` in eager and fx; ``"x86"``, ``"xnnpack"`` or
            ``"tensorrt"`` in pt2e.
        module: Dotted name of the network in the LightningModule, or a list of them, or ``"."`` for the
            LightningModule's own ``forward``; found by itself where it is clear.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs of the network's ``forward``,
            with a batch dimension; by default ``example_input_array``, or caught from a real batch.
        scheme: Bits and granularity.
        start: When rounding comes on: an epoch (int), a share of the planned training (float), or
            ``{"epoch": n}``, ``{"step": n}``, ``{"fraction": f}``.
        freeze_observers: When activation ranges stop; None for never.
        freeze_batchnorm: When BatchNorm statistics stop; None for never.
        include: Globs of module names, relative to the LightningModule; only these are quantized.
        exclude: Globs of module names that stay float.
        convert_on_fit_end: Make the int8 network at the end of the fit. If False, tests run fake-quant.
        float_checkpoint: A checkpoint of a float run, whose weights are the ``"float"`` variant to compare with,
            instead of the weights as they were when rounding came on.
        reset_best_on_start: Let ``ModelCheckpoint`` and ``EarlyStopping`` begin anew when rounding comes on, so that a
            checkpoint of the float phase is not called the best.
        observe_stages: The stages in which ranges move until they freeze: ``"train"``, and if they are named
            ``"validate"``, and ``"test"`` and ``"predict"`` where these run fake-quant. BatchNorm statistics move in
            training only.
        equalization: Make neighbouring layers share the range of their weights before anything is prepared:
            ``"exact"`` where the network stays the same, ``"replace_relu6"`` also across ReLU6, which become ReLU.
        batchnorm: ``"fused"``: BatchNorm trains on, and weights are rounded as they will be with it folded in.
            ``"fold"``: it is folded into the weights before anything trains, so that steps are cheaper; for networks
            that were trained.
        bias_correction_batches: When rounding comes on, take the shift of the mean that rounded weights cause out of
            the biases, measured on as many batches of the training's loader; 0 leaves the biases to the training. For
            short trainings of networks that were trained, with one scale for the tensor or few bits.
        compile: Compile the training steps with ``torch.compile``, in one graph between two switches of the schedule.
            Evaluation and conversion run the network as it is.
        rehearse: Try all that happens to the network up to its int8 file on a copy before the first step: prepare,
            calibrate on one batch, convert, verify, save and load. It takes two to five times as long as preparing,
            and nothing fails after the training that could have been known before it.
        on_fault: What becomes of a layer, or of an op, that cannot be int8: ``"leave_float"`` leaves it float, says so
            in the coverage and in a warning, and converts the rest; ``"error"`` refuses the training. What only the
            trained values bring is always left float, so that it costs a layer and not the fit.

    Attributes:
        prepared: The network with fake-quant (a dict of them by name, if ``module`` is a list of several), once the fit
            has begun.
        quantized: The int8 network (likewise), once there is one.
        float_source: Where the weights of the ``"float"`` variant come from, in words; empty if there is none.
        float_step: The step before which they were taken; None if from elsewhere.
        fidelity: After a test of the int8 network, its closeness to fake-quant: ``agreement`` and ``sqnr_db``.

    Raises:
        ConfigurationError: A setting, or a pair of mode and backend, is not possible; at construction.

    Example:
        >>> qat = QuantizationAwareTraining(mode="fx", backend="x86", start=0.3, freeze_observers=0.7)
        >>> qat.schedule.start
        SchedulePoint(unit='fraction', at=0.3)
    """

    def __init__(
        self,
        mode: str = "fx",
        backend: str = "x86",
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
    ) -> None:
        super().__init__(
            mode,
            backend,
            module,
            example_inputs,
            scheme,
            include,
            exclude,
            convert=convert_on_fit_end,
            equalization=equalization,
            batchnorm=batchnorm,
            rehearse=rehearse,
            on_fault=on_fault,
        )
        self.schedule = QuantizationSchedule(start, freeze_observers, freeze_batchnorm)
        self.float_checkpoint = check_file("float_checkpoint", float_checkpoint)
        check_flag("reset_best_on_start", reset_best_on_start)
        self.reset_best_on_start = reset_best_on_start
        if bias_correction_batches != 0 or type(bias_correction_batches) is not int:
            check_count("bias_correction_batches", bias_correction_batches)
        self.bias_correction_batches = bias_correction_batches
        check_flag("compile", compile)
        self.compile = compile
        self._steps: list[CompiledSteps] = []
        self.observe_stages = check_stages("observe_stages", observe_stages)
        self._driver = ScheduleDriver(self.schedule)
        self.float_source = ""
        self.float_step: int | None = None
        self._nonfinite = NonFiniteReport()

    # Schedule

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what does not go together, and arrange for the preparation."""
        if self.scheme.learned and self.mode == "eager" and trainer.world_size > 1:
            raise ConfigurationError(
                "learned_step in mode='eager' is not possible in several processes, which may take different ways "
                "through the network and then begin to learn from different ranges: use mode='fx' or mode='pt2e'."
            )
        if self.compile and stage == "fit":
            check_compiler(trainer.strategy.root_device, trainer.world_size)
        if stage == "fit":
            self._driver.new_fit(trainer)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that learned scales are optimized, and log the settings."""
        check_optimized(trainer, self._prepared)
        super().on_fit_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Reduce the gradients of learned scales, which are kept from DistributedDataParallel."""
        if self.scheme.learned and trainer.world_size > 1 and self._phase.fake_quant:
            reduce_gradients(self._prepared)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Work out how long the training is planned to be."""
        mend_resume(trainer)
        self._driver.begin(trainer, self._phase)
        self._others_now()
        for prepared in self._prepared.values():
            # In eager mode processes may take different ways through the network.
            same_order = prepared_state(prepared).recipe.mode != "eager"
            reduce_ranges(prepared, trainer.world_size > 1 and same_order)
        if trainer.is_global_zero:
            self._say_what_stays_float(trainer)
        self._step_phase(trainer)
        self._run_compiled(pl_module)  # last, so that nothing copies a compiled network

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch before the epoch's first batch."""
        self._step_phase(trainer)
        # Anew, whatever else touched the flags since.
        self._apply(self._phase)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch before the optimizer step that a point names, and log what is on."""
        self._step_phase(trainer)
        self._driver.before_batch(trainer, self._prepared, self._phase)
        if estimates_batchnorm(trainer):
            self._let_batchnorm_move()
        self._in_training_step(True)
        if not trainer.barebones:
            pl_module.log_dict(curves(self._phase), on_step=True, on_epoch=False, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where activations were not finite; once an epoch, because it waits for the device."""
        self._nonfinite.look(self._prepared)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how things stand, and where activations were not finite, which may be why; leave nothing behind."""
        super().on_exception(trainer, pl_module, exception)
        self._in_training_step(False)
        self._nonfinite.look(self._prepared)
        if trainer.state.fn == "fit" and self._prepared and trainer.global_step:
            rank_zero_info(
                f"The fit was broken off at step {trainer.global_step} by {type(exception).__name__}. The network is "
                "as trained so far, with fake-quant, and was not converted; another fit goes on from its last "
                "checkpoint with ckpt_path='last'."
            )

    def _in_training_step(self, begins: bool) -> None:
        """What a step computes belongs to the training, also where a part of the network is kept in evaluation."""
        for prepared in self._prepared.values():
            in_training_step(prepared, begins)

    def _step_phase(self, trainer: Trainer) -> None:
        step, phase = self._driver.phase(trainer, self._prepared)
        phase = phase.latched(self._phase)
        comes_on = phase.fake_quant and not self._phase.fake_quant
        if comes_on:
            self._rounding_comes_on(trainer, step)
        if phase.batchnorm_frozen and not self._phase.batchnorm_frozen:
            self._driver.freeze_batchnorm(trainer, self._prepared, step)
        if phase != self._phase:
            self._apply(phase)
        if comes_on and self.bias_correction_batches:
            self._correct_biases(trainer)

    def _rounding_comes_on(self, trainer: Trainer, step: int) -> None:
        if self.float_checkpoint is None and (step > 0 or self.bias_correction_batches):  # else as the fit began
            self._float_weights = {name: float_weights(prepared) for name, prepared in self._prepared.items()}
            self.float_step = step
            self.float_source = f"the weights before step {step}, when rounding came on"
        if self.reset_best_on_start and step > 0:
            forget_best(trainer)

    def _say_what_stays_float(self, trainer: Trainer) -> None:
        """Before the training; what is left out on purpose needs no word."""
        rows = [row for name in self._prepared for row in self._coverage(name)]
        log_coverage(trainer, "quant/coverage_prepared", rows)
        layers = [row for row in rows if row.what == "layer"]
        warn_of_float([row for row in layers if not row.excluded], "will stay float")

    def _correct_biases(self, trainer: Trainer) -> None:
        compiled = bool(self._steps)
        self._run_plain()
        module = trainer.lightning_module
        loader = calibration_loader(trainer, module, None)
        calls = calls_in_steps(module, self._slots, self._prepared, loader, self.bias_correction_batches)
        for name, prepared in self._prepared.items():
            corrected = correct_biases(prepared, calls[name])
            rank_zero_info(f"{name!r}: the biases of {len(corrected)} layers were corrected.")
        if trainer.world_size > 1:
            take_over_from_first(self._prepared)
        if compiled:
            self._run_compiled(module)

    def _run_compiled(self, pl_module: LightningModule) -> None:
        if self.compile:
            for name, slot in self._slots.items():
                owner = pl_module if slot.name == OWN_FORWARD else self._prepared[name]
                self._steps.append(CompiledSteps(self._prepared[name], owner, name))

    def _apply(self, phase: Phase) -> None:
        if phase != self._phase:
            for steps in self._steps:
                steps.switched()
        super()._apply(phase)

    def _let_batchnorm_move(self) -> None:
        """In the pass in which stochastic weight averaging estimates its statistics, also where they are frozen."""
        if self._phase.batchnorm_frozen:
            for steps in self._steps:
                steps.switched()
            for prepared in self._prepared.values():
                set_phase(prepared, **dataclasses.asdict(self._phase) | {"batchnorm_frozen": False})

    def _run_plain(self) -> None:
        for steps in self._steps:
            steps.remove()
        self._steps = []

    def _leave_nothing(self) -> None:
        self._run_plain()
        self._driver.end()
        super()._leave_nothing()

    # Float weights to compare with

    def _will_prepare(self, slots: Mapping[str, Slot]) -> None:
        super()._will_prepare(slots)
        if self.float_checkpoint is not None:
            for name, slot in slots.items():
                read_float_weights(self.float_checkpoint, name, slot.prefix, slot.get().state_dict())

    def _rehearses(self, stage: str) -> bool:
        return super()._rehearses(stage) and (self.convert_on_fit_end or self.mode == "auto")

    def _weights_to_rehearse(self) -> Mapping[str, Any]:
        return {} if self.float_checkpoint is None else read_float_state(self.float_checkpoint)

    def _was_prepared(self) -> None:
        super()._was_prepared()
        keep_from_ddp(next(iter(self._slots.values())).pl_module, self._prepared)
        if self.float_checkpoint is not None:
            for name, prepared in self._prepared.items():
                state = prepared_state(prepared)
                reworking = state.reworking
                given = (state.float_network if reworking is None else reworking.given).state_dict()
                found = read_float_weights(self.float_checkpoint, name, self._slots[name].prefix, given)
                self._float_weights[name] = found if reworking is None else reworking.rework(found)
            self.float_source = f"checkpoint {self.float_checkpoint}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let all processes go on with the same ranges, where they are not reduced as they are observed."""
        self._driver.after_batch()
        self._in_training_step(False)
        if trainer.world_size > 1 and self._phase.observers:
            for prepared in self._prepared.values():
                if prepared_state(prepared).recipe.mode == "eager":
                    merge_ranges(prepared)

    # Convert

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all processes hold the ranges and statistics that checkpoints have: those of the first."""
        self._run_plain()
        self._driver.end()
        self._apply(self._phase)
        if trainer.world_size > 1:
            for prepared in self._prepared.values():
                for buffer in prepared.buffers():
                    torch.distributed.broadcast(buffer, src=0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the int8 network of what was trained."""
        if not self._prepared or not has_trained(trainer):
            return
        self._source = f"the fit that ended at step {trainer.global_step}"
        self._others_now()
        if not self.convert_on_fit_end:
            return
        if not self._ranges_seen():
            rank_zero_warn(
                "The fit trained nothing, so that no range was ever observed, and there is no int8 network: ckpt_path= "
                "is of a run that was as long already. Give the Trainer more max_epochs or max_steps than that."
            )
            return
        if self._simulated:
            rank_zero_warn(
                f"No int8 network is made: {self._simulated}. The scheme is simulated: trainer.test runs fake-quant."
            )
            return
        if not self._phase.fake_quant:
            rank_zero_warn(
                f"The fit ended at step {trainer.global_step} before rounding came on (start={self.schedule.start}): "
                "the int8 network was not trained for its grid. Train longer, or give an earlier start."
            )
        self._convert_or_say(trainer, to_run=False)

    # Checkpoint: tensors and plain values only, which torch.load(weights_only=True) takes

    def state_dict(self) -> dict[str, Any]:
        """What was reached of the schedule, and the float weights to compare with."""
        return {
            "phase": dataclasses.asdict(self._phase),
            "float_weights": self._float_weights,
            "float_source": self.float_source,
            "float_step": self.float_step,
            "schedule": self._driver.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self._phase = Phase(**state_dict["phase"])
        self.float_step = state_dict["float_step"]
        self._driver.load_state_dict(state_dict.get("schedule", {}))
        if self.float_checkpoint is None:
            self._float_weights = state_dict["float_weights"]
            self.float_source = state_dict["float_source"]
        self._apply(self._phase)
