"""The callback that logs per-layer quantization statistics, during training or after calibration."""

from __future__ import annotations

import copy
import csv
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from qat_lightning.callbacks.parts.arguments import check_flag, check_names
from qat_lightning.callbacks.parts.calibration_data import calibration_loader, run_in_steps
from qat_lightning.callbacks.post_training_quantization import PostTrainingQuantization
from qat_lightning.callbacks.quantization_callback import QuantizationCallback
from qat_lightning.callbacks.weight_oscillations import WeightOscillations
from qat_lightning.errors import ConfigurationError, QuantizationError
from qat_lightning.graph.example import example_of
from qat_lightning.measure.layer_figures import LayerFigures
from qat_lightning.measure.monitoring import COLUMNS, FIGURES, Probe, totals
from qat_lightning.storage import Place, is_file, join, open_to_append, place

FILE = "quantization_layers.csv"
CURVES = (
    "scale",
    "zero_point",
    "low",
    "high",
    "clipped_share",
    "weight_sqnr_db",
    "activation_sqnr_db",
    "oscillating_share",
)
"""The statistics that are logged as curves per layer by default."""


class QuantizationMonitor(Callback):
    """Logs scale, range, clipping, dead channels and SQNR of every layer that a quantization callback prepared.

    One training step in ``every_n_steps`` is measured, and the last of the fit: its first batch, in the first process.
    Training is bit-equal with and without the monitor. Before fake-quantization is enabled, figures of activations are
    those that rounding would give; weights are measured once it is enabled.

    With `PostTrainingQuantization` the calibrated network is measured once per calibration: at the end of a fit, or
    before ``validate``, ``test`` or ``predict``, on the first calibration batch and without gradients.

    In W&B: curves of the whole network (``quant/least_weight_sqnr_db``, ``quant/least_activation_sqnr_db``,
    ``quant/most_clipped_share``, ``quant/most_gradient_cut_share``, ``quant/most_weight_gradient_cut_share``,
    ``quant/dead_channels``, and with `WeightOscillations` ``quant/most_oscillating_share``), the chosen ``curves`` of
    each layer (``quant/<curve>/<layer>``), histograms (``quant/activations/<layer>`` of values,
    ``quant/weight_integers/<layer>``), and in the end the table ``quant/layers`` with all figures of the last
    measured step. Other loggers get the curves of the whole network, and the figures of each layer go to
    ``quantization_layers.csv`` in the logger's folder.

    Args:
        every_n_steps: Optimizer steps from one measured step to the next.
        samples: How many samples of a batch are measured; None for all. Dead channels are looked for in all of them.
        curves: Which figures are curves of each layer in W&B: ``scale``, ``zero_point``, ``low``, ``high``,
            ``clipped_share``, ``dead_channels``, ``weight_sqnr_db``, ``activation_sqnr_db``, ``gradient_cut_share``,
            ``weight_clipped_share``, ``weight_gradient_cut_share``, ``weight_scale_min``, ``weight_scale_max``,
            ``weight_low``, ``weight_high``, ``oscillating_share``, ``frozen_share``. All are in the table.
        histograms: Whether W&B gets histograms.

    Attributes:
        layers: The figures of the last measured step, a `qat_lightning.measure.monitoring.LayerFigures` for each layer.

    Raises:
        ConfigurationError: An argument is not valid; at construction.

    Example:
        >>> QuantizationMonitor(every_n_steps=200, curves=["weight_sqnr_db"]).curves
        ('weight_sqnr_db',)
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        samples: int | None = 8,
        curves: Sequence[str] = CURVES,
        histograms: bool = True,
    ) -> None:
        self.every_n_steps = _check_count("every_n_steps", every_n_steps)
        self.samples = None if samples is None else _check_count("samples", samples)
        self.curves = check_names("curves", curves, example="['weight_sqnr_db']")
        unknown = [name for name in self.curves if name not in FIGURES]
        if unknown:
            raise ConfigurationError(f"curves: {unknown[0]!r} is unknown: use some of {', '.join(FIGURES)}.")
        check_flag("histograms", histograms)
        self.histograms = histograms
        self.layers: list[LayerFigures] = []
        self._probe: Probe | None = None
        self._measuring: int | None = None
        self._measured: int | None = None
        self._known: list[nn.Module] = []
        self._said_why_not = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if the kind of quantization has no fake-quantization to measure."""
        kinds = [callback.kind for callback in _post_training(trainer) if callback.kind != "static"]
        if kinds and not self._said_why_not:
            self._said_why_not = True
            rank_zero_warn(
                f"QuantizationMonitor has nothing to measure: kind={kinds[0]!r} makes the int8 network without "
                "fake-quantization. Use kind='static', or leave the monitor out."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the networks to measure."""
        self._probe, self._measuring, self._measured, self.layers = None, None, None, []
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        calibrated = _post_training(trainer)
        # From an earlier fit; they are created again.
        self._known = [network for callback in calibrated for network in callback.prepared_networks.values()]
        networks: dict[str, nn.Module] = {}
        for callback in callbacks:
            if isinstance(callback, QuantizationCallback) and callback not in calibrated:
                networks |= callback.prepared_networks
        if networks and trainer.is_global_zero:
            self._probe = self._new_probe(trainer, networks)
        elif not networks and not calibrated:
            rank_zero_warn(
                "QuantizationMonitor has nothing to measure: no callback of this Trainer quantizes a network. Add "
                "QuantizationAwareTraining or PostTrainingQuantization, or leave the monitor out."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to measure, if this step is due."""
        step = _step(trainer)
        due = step % self.every_n_steps == 0 or _is_last(trainer)
        if self._probe is not None and due and step != self._measured:
            self._probe.attach()
            self._measuring = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read what was measured, and log it."""
        if self._probe is None or self._measuring is None:
            return
        self._probe.detach()
        self._measured, self._measuring = self._measuring, None
        self.layers = _with_oscillations(trainer, self._probe.figures())
        if self.layers:
            self._log(trainer, self._measured, self._probe)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the table of the last measured step."""
        self._log_table(trainer)
        self._find_calibrated(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what was calibrated at the end of the training, by a callback that comes after this one."""
        self._find_calibrated(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside a fit, measure what was calibrated for it."""
        if trainer.state.fn == "validate":
            self._find_calibrated(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what was calibrated for the test."""
        self._find_calibrated(trainer, pl_module)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what was calibrated for the prediction."""
        self._find_calibrated(trainer, pl_module)

    def _find_calibrated(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the networks that a callback calibrated, unless they are known."""
        for callback in _post_training(trainer):
            networks = callback.prepared_networks
            if any(network not in self._known for network in networks.values()):
                self._known = list(networks.values())
                # Lightning evaluates in inference mode, whose tensors a prepared network cannot keep.
                with torch.inference_mode(False), isolate_rng(include_cuda=torch.cuda.is_initialized()):
                    self._measure_calibrated(trainer, pl_module, callback)

    def _measure_calibrated(
        self, trainer: Trainer, pl_module: LightningModule, callback: PostTrainingQuantization
    ) -> None:
        networks = {name: _on(network, pl_module.device) for name, network in callback.prepared_networks.items()}
        probe = self._new_probe(trainer, networks)
        try:
            # A step may contain collectives: all processes run it, and the first one measures.
            with probe if trainer.is_global_zero else nullcontext():
                _run_first_batch(trainer, pl_module, callback, networks)
        except QuantizationError as error:
            self.layers = []
            rank_zero_warn(f"QuantizationMonitor measured nothing, because no batch could be run: {error}")
            return
        self.layers, self._measured = probe.figures(), _step(trainer)
        if self.layers:
            self._log(trainer, self._measured, probe)
            self._log_table(trainer)
        elif trainer.is_global_zero:
            rank_zero_warn(
                "QuantizationMonitor measured nothing: the calibration data could not be read a second time. Pass a "
                "calibration_dataloader= that can be iterated again, such as a DataLoader, or calls= as a list."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove all hooks."""
        self._clean_up()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks."""
        self._clean_up()

    def _clean_up(self) -> None:
        if self._probe is not None:
            self._probe.detach()
        self._probe, self._measuring = None, None

    def _new_probe(self, trainer: Trainer, networks: dict[str, nn.Module]) -> Probe:
        on_wandb = any(isinstance(logger, WandbLogger) for logger in trainer.loggers)
        samples = self.samples if self.samples is not None else 2**62
        return Probe(networks, samples=samples, histograms=self.histograms and on_wandb)

    def _log(self, trainer: Trainer, step: int, probe: Probe) -> None:
        summary = {f"quant/{name}": value for name, value in totals(self.layers).items()}
        per_layer = False
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                per_layer = True
                logger.log_metrics(summary | self._wandb_curves() | self._wandb_histograms(probe), step)
            else:
                logger.log_metrics(summary, step)
        folder = next((logger.log_dir for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
        if folder is None and trainer.loggers and not per_layer:
            # Not trainer.log_dir, which is a collective operation.
            folder = trainer.loggers[0].log_dir or trainer.loggers[0].save_dir
        if folder is not None:
            _append(join(place(folder), FILE), step, self.layers)

    def _log_table(self, trainer: Trainer) -> None:
        for logger in trainer.loggers if self.layers else ():
            if isinstance(logger, WandbLogger):
                import wandb

                rows = [list(asdict(row).values()) for row in self.layers]
                table = wandb.Table(columns=list(COLUMNS), data=rows, allow_mixed_types=True)
                logger.log_metrics({"quant/layers": table}, self._measured)  # type: ignore[dict-item]

    def _wandb_curves(self) -> dict[str, float]:
        return {
            f"quant/{curve}/{row.layer}": float(value)
            for row in self.layers
            for curve in self.curves
            if (value := getattr(row, curve)) is not None
        }

    def _wandb_histograms(self, probe: Probe) -> dict[str, Any]:
        if not self.histograms:
            return {}
        import wandb

        return {
            f"quant/{name}": wandb.Histogram(np_histogram=(counts.numpy(), edges.numpy()))
            for name, (counts, edges) in probe.histograms().items()
        }


def _check_count(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name}={value!r} is not valid: give a whole number of 1 or more.")
    return value


def _post_training(trainer: Trainer) -> list[PostTrainingQuantization]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, PostTrainingQuantization)]


def _with_oscillations(trainer: Trainer, layers: list[LayerFigures]) -> list[LayerFigures]:
    """Add the shares of oscillating and frozen weights, which `WeightOscillations` tracks."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    shares: dict[str, dict[str, Any]] = {
        layer: {"oscillating_share": oscillating, "frozen_share": frozen}
        for callback in callbacks
        if isinstance(callback, WeightOscillations)
        for layer, (oscillating, frozen) in callback.shares().items()
    }
    return [replace(row, **shares.get(row.layer, {})) for row in layers]


def _on(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network, or a copy on ``device``: after a fit the LightningModule is on the CPU again."""
    here = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), device)
    return network if here == device else copy.deepcopy(network).to(device)


def _run_first_batch(
    trainer: Trainer,
    pl_module: LightningModule,
    callback: PostTrainingQuantization,
    networks: Mapping[str, nn.Module],
) -> None:
    """Call networks on the first of the data that they were calibrated with."""
    if callback.calls is None:
        loader = _calibration_loader(trainer, pl_module, callback.calibration_dataloader)
        run_in_steps(pl_module, callback.slots, networks, loader, 1, nullcontext)
        return
    with torch.no_grad():
        for name, network in networks.items():
            calls = callback.calls[name] if len(networks) > 1 else callback.calls
            for given in islice(calls, 1):
                call = example_of(given)
                args, kwargs = move_data_to_device((call.args, call.kwargs), pl_module.device)
                network(*args, **kwargs)


def _calibration_loader(trainer: Trainer, pl_module: LightningModule, given: Any) -> Any:
    """Return the calibration loader; calibration has set up the datamodule."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if given is None and trainer.state.fn != "fit" and is_overridden("train_dataloader", datamodule):
        return datamodule.train_dataloader()
    return calibration_loader(trainer, pl_module, given)


def _step(trainer: Trainer) -> int:
    """Return the number of batches with optimizer steps, for any number of optimizers; Lightning's axis for logging."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _is_last(trainer: Trainer) -> bool:
    """Whether the step that begins is planned to be the fit's last."""
    if trainer.max_steps > 0 and trainer.global_step + 1 >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return last_epoch and trainer.is_last_batch


def _append(path: Place, step: int, rows: Sequence[LayerFigures]) -> None:
    """Add the rows of a step to a CSV file, which begins with the names of its columns."""
    begins = not is_file(path)
    with open_to_append(path) as file:
        writer = csv.writer(file)
        if begins:
            writer.writerow(("step", *COLUMNS))
        writer.writerows((step, *asdict(row).values()) for row in rows)
