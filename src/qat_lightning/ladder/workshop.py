"""Creates the network of a plan and evaluates it, each time on fresh copies and with the same seed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn

from qat_lightning.artifact import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks.distillation import Distillation
from qat_lightning.callbacks.parts.calibration_data import calls_in_steps
from qat_lightning.callbacks.parts.find_networks import find_networks
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.callbacks.post_training_quantization import PostTrainingQuantization
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.callbacks.quantization_callback import QuantizationCallback
from qat_lightning.errors import ConfigurationError, ExportError, NetworkError
from qat_lightning.export.call import Call
from qat_lightning.export.formats import get_format
from qat_lightning.export.protocol import Source
from qat_lightning.export.result import ExportResult
from qat_lightning.export.run import export_quantized, open_artifact
from qat_lightning.graph.example import Example
from qat_lightning.json_files import read_json, write_json
from qat_lightning.ladder.copies import Copies
from qat_lightning.ladder.parts import Parts, set_up, validate_parts, validate_whole
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.standing import StandingIn
from qat_lightning.ladder.store import EXPORTED, NETWORK
from qat_lightning.ladder.timing import quietest
from qat_lightning.numerics.sqnr import finite
from qat_lightning.recipes.adaround import AdaRound
from qat_lightning.rehearsal.rehearse import OnFault
from qat_lightning.run.evaluate import logged_behind, measure_networks
from qat_lightning.storage import Place

TrainerFactory = Callable[..., Trainer]
Standing = tuple[Trainer, StandingIn, LightningModule, LightningDataModule]
FREEZE = 0.7
"""The fraction of a training after which ranges and BatchNorm's statistics freeze, as in ``method=qat`` of train.py."""


@dataclass(frozen=True)
class Making:
    """Settings that all rungs share.

    Attributes:
        module: As for `qat_lightning.PostTrainingQuantization`, one network only.
        example_inputs: As there.
        calibration_batches: As there.
        on_fault: As there.
        seed: The seed of each rung.
    """

    module: str | None = None
    example_inputs: Any = None
    calibration_batches: int = 32
    on_fault: OnFault = "leave_float"
    seed: int = 0


@dataclass(frozen=True)
class Validation:
    """How networks are validated; measured with the float network.

    Attributes:
        metric: The key of the metric that is judged.
        batches: The number of validation batches; None for a loader without a length.
        parts_tell: Whether the mean over the parts equals the metric on all data, so that only parts are validated.
    """

    metric: str
    batches: int | None
    parts_tell: bool


@dataclass(frozen=True)
class Measured:
    """The measurements of a network.

    Attributes:
        parts: The metric on each part of the validation data.
        metrics: All metrics, under the keys of the loggers.
        speedup: Speed relative to float.
        size_mb: Size of the shipped files, in 10^6 bytes.
    """

    parts: Parts
    metrics: dict[str, float]
    speedup: float | None
    size_mb: float | None


class Workshop:
    """Creates networks and evaluates them.

    Args:
        trainer_factory: Called with keyword arguments of a Trainer.
        model: The float LightningModule; copied, and not changed.
        datamodule: The data; copied, and not changed.
        making: The settings that all rungs share.
        float_checkpoint: A checkpoint of the float weights, for comparison and distillation.

    Raises:
        ConfigurationError: There are several candidates for the network, or the data cannot be copied.
    """

    def __init__(
        self,
        trainer_factory: TrainerFactory,
        model: LightningModule,
        datamodule: LightningDataModule,
        making: Making,
        float_checkpoint: Path,
    ) -> None:
        names = find_networks(model, making.module)
        if len(names) > 1:
            raise ConfigurationError(
                f"Several networks could be meant: {', '.join(names)}. A target applies to one: give module= with its "
                "name."
            )
        (self.name,) = names
        self.trainer_factory, self.making, self.float_checkpoint = trainer_factory, making, float_checkpoint
        self._calls: dict[int, list[Example]] = {}
        self._copies = Copies(model, datamodule, making.seed, partial(self.trainer, [], [], enable_progress_bar=False))

    def copies(self) -> tuple[LightningModule, LightningDataModule]:
        """Fresh copies of the float LightningModule and the data, after seeding everything."""
        return self._copies.fresh()

    @property
    def network(self) -> nn.Module:
        """A copy of the float network, on the CPU, in evaluation."""
        return copy.deepcopy(Slot(self._copies.model, self.name).get()).cpu().eval()

    @property
    def prefix(self) -> str:
        """The prefix of its module names in the LightningModule."""
        return Slot(self._copies.model, self.name).prefix

    def trainer(self, callbacks: Sequence[Callback], loggers: Sequence[Logger], **settings: Any) -> Trainer:
        """A Trainer from the user's factory, with the callbacks and loggers of a rung."""
        return self.trainer_factory(
            callbacks=list(callbacks),
            logger=list(loggers) or False,
            enable_checkpointing=False,
            enable_model_summary=False,
            **settings,
        )

    # The data

    def calls(self, batches: int) -> list[Example]:
        """The inputs of the float network in some batches of the training data, on the CPU; read once."""
        if batches not in self._calls:
            self._calls[batches] = self._read_calls(batches)
        return self._calls[batches]

    def _read_calls(self, batches: int) -> list[Example]:
        model, datamodule = self.copies()
        trainer = self.trainer([], [], enable_progress_bar=False, limit_val_batches=1)
        trainer.validate(model, datamodule=datamodule, verbose=False)  # attaches them to a Trainer
        datamodule.setup("fit")
        slot = Slot(model.cpu(), self.name)
        with torch.inference_mode(False):
            loader = datamodule.train_dataloader()
            return calls_in_steps(model, {self.name: slot}, {self.name: self.network}, loader, batches)[self.name]

    # Make

    def make(self, plan: Plan, folder: Path, loggers: Sequence[Logger], minutes: float) -> tuple[Plan, bool]:
        """Create the int8 network of a plan and write it into a folder.

        Args:
            plan: The plan.
            folder: The folder that gets ``model.int8``.
            loggers: The loggers of the rung.
            minutes: The time limit of a training.

        Returns:
            The plan, with the mode that ``"auto"`` chose, and whether its training ended before its last epoch.

        Raises:
            QuantizationError: The network cannot be created, with the reason.
        """
        if plan.epochs:
            longest = None if math.isinf(minutes) else timedelta(minutes=max(minutes, 1e-3))
            trainer, callback = self.trained(plan, loggers, max_epochs=plan.epochs, max_time=longest)
        else:
            trainer, callback = self.calibrated(plan, loggers)
        cut_short = bool(plan.epochs) and trainer.current_epoch < plan.epochs
        network = callback.network("int8")
        if not isinstance(network, QuantizedNetwork):
            raise NetworkError(
                f"{self.name!r} was not converted to an int8 network, but to a {type(network).__name__}."
            )
        network.save(folder / NETWORK)
        return replace(plan, mode=callback.chosen_modes.get(self.name, plan.mode)), cut_short

    def trained(
        self, plan: Plan, loggers: Sequence[Logger], more: Sequence[Callback] = (), **settings: Any
    ) -> tuple[Trainer, QuantizationCallback]:
        """Train by a plan, with more callbacks and settings of the Trainer."""
        model, datamodule = self.copies()
        callback = self._training(plan)
        teacher = [Distillation()] if plan.distillation else []
        trainer = self.trainer([callback, *teacher, *more], loggers, **settings)
        trainer.fit(model, datamodule=datamodule)
        return trainer, callback

    def calibrated(self, plan: Plan, loggers: Sequence[Logger]) -> tuple[Trainer, QuantizationCallback]:
        """Calibrate by a plan."""
        model, datamodule = self.copies()
        callback = self._calibration(plan)
        trainer = self.trainer([callback], loggers, enable_progress_bar=False, limit_val_batches=1)
        with logged_behind("calibration", trainer.loggers):
            trainer.validate(model, datamodule=datamodule, verbose=False)
        return trainer, callback

    def _common(self, plan: Plan) -> dict[str, Any]:
        return {
            "mode": plan.mode,
            "backend": plan.backend,
            "module": self.name,
            "example_inputs": self.making.example_inputs,
            "scheme": plan.scheme,
            "kind": plan.kind,
            "include": list(plan.include) or None,
            "exclude": list(plan.exclude) or None,
            "equalization": plan.equalization,
            "smoothquant": plan.smoothquant,
            "rotation": plan.rotation,
            "on_fault": self.making.on_fault,
        }

    def _calibration(self, plan: Plan) -> QuantizationCallback:
        blocks: Literal["none", "auto"] = "auto" if plan.adaround_blocks else "none"
        long = bool(plan.adaround or plan.sequential_mse)
        return PostTrainingQuantization(
            **self._common(plan),
            rehearse=long or plan.mode == "auto",  # otherwise the conversion comes as soon as a rehearsal would end
            calibration_batches=self.making.calibration_batches,
            bias_correction=plan.bias_correction,
            adaround=AdaRound(plan.adaround, blocks=blocks) if plan.adaround else None,
            sequential_mse=plan.sequential_mse,
        )

    def _training(self, plan: Plan) -> QuantizationCallback:
        frozen = FREEZE if plan.kind == "static" else None
        return QuantizationAwareTraining(
            **self._common(plan),
            start=0,
            freeze_observers=frozen,
            freeze_batchnorm=FREEZE,
            float_checkpoint=self.float_checkpoint,
        )

    # Evaluate

    def load(self, folder: Path) -> QuantizedNetwork:
        """Load the int8 network of a rung."""
        return load_quantized(folder / NETWORK, network=self.network)

    def standing(self, loggers: Sequence[Logger], network: nn.Module | None, call: Any) -> Standing:
        """A Trainer that evaluates a network in place of the float one, with fresh copies of the model and the data."""
        model, datamodule = self.copies()
        callback = StandingIn(Slot(model, self.name), network, call)
        return self.trainer([callback], loggers, enable_progress_bar=False), callback, model, datamodule

    def measure(
        self,
        network: QuantizedNetwork,
        plan: Plan,
        folder: Path,
        loggers: Sequence[Logger],
        validation: Validation,
        *,
        steady: bool,
    ) -> Measured:
        """Validate the shipped network, and measure its size and latency.

        Args:
            network: The int8 network.
            plan: Its plan.
            folder: The folder of the rung.
            loggers: The loggers of the rung.
            validation: How networks are validated.
            steady: Whether noisy latencies are measured again.

        Raises:
            ExportError: The export to another runtime failed.
        """
        with self.shipped(network, plan, folder) as (standing_in, figures):
            trainer, _, model, datamodule = self.standing(loggers, standing_in, network.example)
            whole: Mapping[str, float] = {}
            batches: float | None = validation.batches
            if validation.parts_tell:
                set_up(trainer, model, datamodule)
            else:
                with logged_behind("int8", trainer.loggers):
                    whole = validate_whole(trainer, model, datamodule)
                (batches,) = trainer.num_val_batches
            parts = validate_parts(trainer, model, datamodule, validation.metric, self.making.seed, batches)
        metrics = {f"int8/{key}": value for key, value in (whole or parts.means).items()}
        call = (network.example.args, network.example.kwargs)
        if not plan.file:
            networks = {"float": self.network, "int8": network}
            metrics |= quietest(lambda: measure_networks(networks, [call]), *([] if steady else [1]))
            return Measured(parts, finite(metrics), metrics.get("speedup"), metrics.get("int8/size_mb"))
        metrics |= {f"{plan.file}/{key}": value for key, value in figures.items()}
        return Measured(parts, finite(metrics), figures.get("speedup"), figures.get("size_mb"))

    @contextmanager
    def shipped(
        self, network: QuantizedNetwork, plan: Plan, folder: Path
    ) -> Iterator[tuple[nn.Module, dict[str, float]]]:
        """The shipped network: int8 in PyTorch, or its exported file in another runtime, with the file's measurements.

        Raises:
            ExportError: The export failed, or the runtime does not load the file.
        """
        if not plan.file:
            yield network, {}
            return
        result, figures = self._exported(network, plan, folder)
        with open_artifact(result) as artifact:
            yield artifact, figures

    def _exported(self, network: QuantizedNetwork, plan: Plan, folder: Path) -> tuple[ExportResult, dict[str, float]]:
        """Export and measure a file; one that was exported before keeps its measurements."""
        where, noted = folder / "export", folder / EXPORTED
        if noted.is_file():
            kept = read_json(noted)
            files: list[Place] = [where / name for name in kept["files"]]
            call = Call.of(Source(network, network.example))
            return ExportResult(plan.file, get_format(plan.file).runtime, files, call=call), kept["figures"]
        # Accuracy is judged by the user's metric.
        (result,) = export_quantized(
            network, where, [plan.file], float_network=self.network, min_agreement=0, min_sqnr_db=0
        )
        if not result.passed:
            raise ExportError(result.error)
        figures = finite(result.figures())
        write_json(noted, {"files": [Path(file).name for file in result.files], "figures": figures})
        return result, figures
