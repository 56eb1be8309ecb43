"""Makes the network of a plan, and evaluates it: each time on fresh copies, from the same seed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from torch import nn

from qat_lightning.artifact import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks.distillation import Distillation
from qat_lightning.callbacks.parts.calibration_data import calls_in_steps
from qat_lightning.callbacks.parts.network import Slot, find_networks
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
from qat_lightning.ladder.parts import Parts, set_up, validate_parts, validate_whole
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.standing import StandingIn
from qat_lightning.ladder.store import EXPORTED, NETWORK
from qat_lightning.ladder.timing import quietest
from qat_lightning.numerics.sqnr import EQUAL_DB
from qat_lightning.recipes.adaround import AdaRound
from qat_lightning.rehearsal.rehearse import OnFault
from qat_lightning.run.evaluate import logged_behind, measure_networks
from qat_lightning.storage import Place

TrainerFactory = Callable[..., Trainer]
Standing = tuple[Trainer, StandingIn, LightningModule, LightningDataModule]
FREEZE = 0.7
"""After which share of a training ranges and BatchNorm's statistics freeze, as in ``method=qat`` of train.py."""


@dataclass(frozen=True)
class Making:
    """What all rungs have in common.

    Attributes:
        module: As for `qat_lightning.PostTrainingQuantization`, one network only.
        example_inputs: See there.
        calibration_batches: See there.
        on_fault: See there.
        seed: Of each rung.
    """

    module: str | None = None
    example_inputs: Any = None
    calibration_batches: int = 32
    on_fault: OnFault = "leave_float"
    seed: int = 0


@dataclass(frozen=True)
class Validation:
    """How the float network was validated, and all others are.

    Attributes:
        metric: The key of what is judged.
        batches: Of all the data; None for a loader without a length.
        parts_tell: Whether the mean over the parts is the metric of the whole, so that the parts alone are validated.
    """

    metric: str
    batches: int | None
    parts_tell: bool


@dataclass(frozen=True)
class Measured:
    """What was measured of a network.

    Attributes:
        parts: The metric on each part of the validation data; empty while the metric is not chosen.
        metrics: Under the keys of the loggers.
        speedup: Times faster than float.
        size_mb: Of what is shipped.
    """

    parts: Parts
    metrics: dict[str, float]
    speedup: float | None
    size_mb: float | None


class Workshop:
    """Makes networks and evaluates them.

    Args:
        trainer_factory: Makes a Trainer of keyword arguments.
        model: The float LightningModule; it is copied, and stays as it is.
        datamodule: Likewise.
        making: What all rungs have in common.
        float_checkpoint: Where the float weights are, to be compared with and learned from.

    Raises:
        ConfigurationError: Several networks could be meant, or the data cannot be copied.
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
        self._model = untied(model)
        self._datamodule = untied(datamodule)
        self._has_data = False

    def copies(self) -> tuple[LightningModule, LightningDataModule]:
        """The float LightningModule and the data as they were, and everything that is drawn from the same seed."""
        if not self._has_data:
            self._datamodule, self._has_data = self._with_data(), True
        return self._fresh()

    def _fresh(self) -> tuple[LightningModule, LightningDataModule]:
        seed_everything(self.making.seed, workers=True, verbose=False)
        return copy.deepcopy(self._model), copy.deepcopy(self._datamodule)

    def _with_data(self) -> LightningDataModule:
        """The data as ``setup`` leaves it, so that what a datamodule keeps is not read again for each rung.

        Where ``setup`` creates what cannot be copied, each rung sets its own copy up.

        Raises:
            ConfigurationError: The Trainer has several processes.
        """
        model, datamodule = self._fresh()
        trainer = self.trainer([], [], enable_progress_bar=False)
        if trainer.world_size > 1:
            raise ConfigurationError(
                f"The Trainer has {trainer.world_size} processes, and a search runs in one: use devices=1."
            )
        set_up(trainer, model, datamodule)
        try:
            kept: LightningDataModule = untied(datamodule)
        except ConfigurationError:
            return self._datamodule
        return kept

    @property
    def network(self) -> nn.Module:
        """A copy of the float network, on the CPU, in evaluation."""
        return copy.deepcopy(Slot(self._model, self.name).get()).cpu().eval()

    @property
    def prefix(self) -> str:
        """What the names of its modules begin with in the LightningModule."""
        return Slot(self._model, self.name).prefix

    def trainer(self, callbacks: Sequence[Callback], loggers: Sequence[Logger], **settings: Any) -> Trainer:
        """A Trainer of the user's, with what a rung needs."""
        return self.trainer_factory(
            callbacks=list(callbacks),
            logger=list(loggers) or False,
            enable_checkpointing=False,
            enable_model_summary=False,
            **settings,
        )

    # The data

    def calls(self, batches: int) -> list[Example]:
        """What the float network is called with in some batches of the training data, on the CPU."""
        model, datamodule = self.copies()
        trainer = self.trainer([], [], enable_progress_bar=False, limit_val_batches=1)
        trainer.validate(model, datamodule=datamodule, verbose=False)  # ties them to a Trainer
        datamodule.setup("fit")
        slot = Slot(model.cpu(), self.name)
        with torch.inference_mode(False):
            loader = datamodule.train_dataloader()
            return calls_in_steps(model, {self.name: slot}, {self.name: self.network}, loader, batches)[self.name]

    # Make

    def make(self, plan: Plan, folder: Path, loggers: Sequence[Logger], minutes: float) -> tuple[Plan, bool]:
        """Make the int8 network of a plan and write it into a folder.

        Args:
            plan: What to make.
            folder: Gets ``model.int8``.
            loggers: Of the rung.
            minutes: How long a training may take.

        Returns:
            The plan with the mode that ``"auto"`` left open, and whether a training was cut short.

        Raises:
            QuantizationError: It cannot be made, with the reason.
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
        """Train as a plan says, with further callbacks and with these settings of the Trainer."""
        model, datamodule = self.copies()
        callback = self._training(plan)
        teacher = [Distillation()] if plan.distillation else []
        trainer = self.trainer([callback, *teacher, *more], loggers, **settings)
        trainer.fit(model, datamodule=datamodule)
        return trainer, callback

    def calibrated(self, plan: Plan, loggers: Sequence[Logger]) -> tuple[Trainer, QuantizationCallback]:
        """Calibrate as a plan says."""
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
        return PostTrainingQuantization(
            **self._common(plan),
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
        """The int8 network that a rung made."""
        return load_quantized(folder / NETWORK, network=self.network)

    def standing(self, loggers: Sequence[Logger], network: nn.Module | None, call: Any) -> Standing:
        """A Trainer that evaluates a network in the place of the float one, and fresh copies to give to it."""
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
        """Evaluate what is shipped on the validation data, weigh it and time it.

        Args:
            network: The int8 network.
            plan: How it was made.
            folder: Of the rung.
            loggers: Of the rung.
            validation: How the float network was validated.
            steady: Whether noisy latencies are measured again.

        Raises:
            ExportError: The file of another runtime cannot be made.
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
        """What is shipped, to be called: the int8 network, or its file in another runtime with the file's figures.

        Raises:
            ExportError: The file cannot be made, or its runtime does not take it.
        """
        if not plan.file:
            yield network, {}
            return
        result, figures = self._exported(network, plan, folder)
        with open_artifact(result) as artifact:
            yield artifact, figures

    def _exported(self, network: QuantizedNetwork, plan: Plan, folder: Path) -> tuple[ExportResult, dict[str, float]]:
        """Write a file and time it; one that is there already keeps the figures that it got then."""
        where, noted = folder / "export", folder / EXPORTED
        if noted.is_file():
            kept = read_json(noted)
            files: list[Place] = [where / name for name in kept["files"]]
            call = Call.of(Source(network, network.example))
            return ExportResult(plan.file, get_format(plan.file).runtime, files, call=call), kept["figures"]
        # What it computes is judged by the user's metric.
        (result,) = export_quantized(
            network, where, [plan.file], float_network=self.network, min_agreement=0, min_sqnr_db=0
        )
        if not result.passed:
            raise ExportError(result.error)
        figures = finite(result.figures())
        write_json(noted, {"files": [Path(file).name for file in result.files], "figures": figures})
        return result, figures


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as JSON takes them: `EQUAL_DB` for infinity, as in the loggers, and without what is no number.

    Example:
        >>> finite({"int8/sqnr_db": math.inf, "val/f1": math.nan, "val/acc": 0.5})
        {'int8/sqnr_db': 300.0, 'val/acc': 0.5}
    """
    numbers = {key: value for key, value in metrics.items() if not math.isnan(value)}
    return {k: v if math.isfinite(v) else math.copysign(EQUAL_DB, v) for k, v in numbers.items()}


def untied(thing: Any) -> Any:
    """A copy of a LightningModule or a LightningDataModule, without the Trainer that it may be tied to.

    Raises:
        ConfigurationError: It cannot be copied.
    """
    before = thing.__dict__.get("_trainer"), thing.__dict__.get("trainer")
    thing.trainer = None
    try:
        return copy.deepcopy(thing)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ConfigurationError(
            f"{type(thing).__name__} cannot be copied ({error}), and each rung starts from a copy of it: create what "
            "it holds in setup()."
        ) from error
    finally:
        thing.trainer = before[0] or before[1]
