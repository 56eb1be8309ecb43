"""The callback that writes the int8 network in formats of real runtimes when the fit, or an evaluation, ends."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks.parts.arguments import check_count, check_names, check_number
from qat_lightning.callbacks.parts.calibration_data import (
    calibration_loader,
    calls_and_batches,
    evaluation_loaders,
    holds_loader,
)
from qat_lightning.callbacks.parts.variants import numbers_of_classes
from qat_lightning.callbacks.quantization_callback import QuantizationCallback
from qat_lightning.errors import CombinationError, ConfigurationError, ExportError, QuantizationError
from qat_lightning.export.formats import FORMATS, check_formats
from qat_lightning.export.result import ExportResult, export_table, fastest
from qat_lightning.export.run import export_quantized, open_artifact, overflow_here
from qat_lightning.graph.example import Example
from qat_lightning.measure.wandb_views import log_artifact
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.processes import any_process, several_processes
from qat_lightning.settings.recipe import Recipe
from qat_lightning.storage import Place, join, place, require_folder
from qat_lightning.terminal import console


class QuantizedModelExport(Callback):
    """Exports the int8 network in several formats when the fit ends; verifies and times each file.

    Without a fit it exports after the first evaluation: `PostTrainingQuantization` quantizes what is tested. A test or
    prediction for which the int8 network was converted again, because weights (``ckpt_path="best"``) or the layers left
    float have changed, writes the files again, so that they hold what was tested.

    Use it with `QuantizationAwareTraining` or `PostTrainingQuantization`. Each artifact is loaded again in a fresh
    process by its own runtime, compared with fake-quant on real batches, and timed against fp32 in the same runtime and
    in PyTorch. The figures go to the loggers as ``<format>/latency_ms``, ``<format>/agreement`` and so on, to
    ``export.json`` beside the files, and to W&B with each file as an artifact; `qat_lightning.evaluate_variants` adds
    the LightningModule's own metrics. A format that fails costs neither the run nor the others: it is reported.

    Args:
        formats: Names in `qat_lightning.export.FORMATS`; docs/export.md lists which mode and backend each supports.
        dirpath: Where the files go; by default ``export`` in the Trainer's ``default_root_dir``. Both take URLs of
            fsspec's (``s3://bucket/run``), as the Trainer does.
        batches: Real batches to compare on.
        dataloader: Where they come from; by default the validation's loaders, else the test's or the training's.
        min_agreement: Smallest share of outputs whose top-1 must equal fake-quant's.
        min_sqnr_db: Least SQNR of each float output against fake-quant's, in dB; less where the network itself makes
            more than that of a change of its inputs by a thousandth. The table then says which limit was used.

    Attributes:
        results: The result of each format; for several networks in the LightningModule by ``format-network``.

    Raises:
        ConfigurationError: A setting is not valid; at construction.
        CombinationError: A format does not support this mode and backend; before training.
        MissingExtraError: The package of a format, or for the protocol of a URL, is not installed; before training.

    Example:
        >>> QuantizedModelExport(["pt2", "torchscript"], batches=4).formats
        ('pt2', 'torchscript')
    """

    def __init__(
        self,
        formats: Sequence[str] = ("pt2",),
        dirpath: str | None = None,
        batches: int = 8,
        dataloader: Any = None,
        min_agreement: float = 0.995,
        min_sqnr_db: float = 20.0,
    ) -> None:
        self.formats = check_names("formats", formats, example="['pt2', 'torchscript']")
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ConfigurationError(f"formats={list(self.formats)!r} is not valid: use some of {', '.join(FORMATS)}.")
        check_count("batches", batches)
        check_number("min_agreement", min_agreement, least=0)
        check_number("min_sqnr_db", min_sqnr_db, least=0)
        if min_agreement > 1:
            raise ConfigurationError(f"min_agreement={min_agreement!r} is not valid: give a share from 0 to 1.")
        if dirpath is not None:
            require_folder(dirpath)
        self.dirpath = dirpath
        self.batches = batches
        self.dataloader = dataloader
        self.min_agreement = min_agreement
        self.min_sqnr_db = min_sqnr_db
        self.results: dict[str, ExportResult] = {}
        self._exported = 0  # number of the conversion, in every process; only the first has results

    @property
    def fastest(self) -> ExportResult | None:
        """The artifact with the least latency of those that passed; None if none did."""
        return fastest(list(self.results.values()))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before training that the formats support the network's mode and backend."""
        partner = QuantizationCallback.of(trainer, self)
        if not partner.convert_on_fit_end:
            raise CombinationError(
                "QuantizedModelExport needs an int8 network, and convert_on_fit_end=False makes none: leave one out."
            )
        require_folder(self._folder(trainer))
        if partner.mode != "auto":
            self._check(partner.settings.recipe)

    def on_rehearsal(self, trainer: Trainer, slot: str, quantized: QuantizedNetwork, reference: nn.Module) -> list[str]:
        """Try every format on the int8 network of a rehearsal, each in its runtime's own process.

        Returns:
            Messages to report before the first step, because warnings are silenced during a rehearsal.

        Raises:
            ExportError: A format does not take it, and the callback that quantizes has ``on_fault="error"``.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return []
        partner = QuantizationCallback.of(trainer, self)
        self._check(quantized.recipe)
        with tempfile.TemporaryDirectory() as folder:
            results = export_quantized(
                quantized, folder, self.formats, reference=reference, min_agreement=0, min_sqnr_db=0
            )
        found = [f"export={result.format}, in the rehearsal: {result.remark}" for result in results if result.remark]
        found += list(filter(None, [overflow_here(self.formats, quantized.recipe)]))
        failed = {result.format: result.error for result in results if result.error}
        if not failed:
            return found
        reasons = "; ".join(f"{name}: {why.rstrip('.')}" for name, why in failed.items())
        what = f"{len(failed)} of {len(results)} formats cannot hold the int8 network of {slot!r}, the rehearsal found"
        if partner.on_fault == "error":
            rest = [name for name in self.formats if name not in failed]
            use = f"Use formats={rest}" if rest else "Leave QuantizedModelExport out"
            raise ExportError(f"{what}: {reasons}. {use}, or on_fault='leave_float' to continue.")
        return [*found, f"{what}: {reasons}."]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the formats again: with ``mode="auto"`` the mode is known only now."""
        for network in QuantizationCallback.of(trainer, self).prepared_networks.values():
            self._check(prepared_state(network).recipe)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Export, when all other callbacks have seen the end of the fit, and have converted.

        Without a fit, what the first evaluation quantized or read from a checkpoint is exported, and whenever a test or
        a prediction finds it converted again, it is exported again: the files hold what ``quantized`` holds.
        """
        if trainer.fast_dev_run or (stage == "validate" and self._exported):  # type: ignore[attr-defined]
            return
        partner = QuantizationCallback.of(trainer, self)
        if "int8" not in partner.variants:
            if stage == "fit":
                rank_zero_warn(f"Nothing is exported, because there is no int8 network: {partner.why_not('int8')}")
            return
        if not partner.make_int8(trainer) or not self._is_new(trainer, partner):
            return
        if stage != "fit" and self._exported:
            rank_zero_info(
                f"The int8 network was converted again, from {partner.made_from}: the exported files are written again."
            )
        # In every process, because a step may contain collectives.
        calls = {slot: self._calls(trainer, pl_module, partner, slot) for slot in partner.slots}
        self.results, self._exported = {}, partner.conversion
        with partner.whole(everywhere=False):
            if trainer.is_global_zero:
                self._export_all(trainer, partner, calls)

    def _is_new(self, trainer: Trainer, partner: QuantizationCallback) -> bool:
        """Whether the int8 networks were converted since the last export, in any process: all of them export."""
        new = partner.conversion != self._exported
        return any_process(new) if several_processes(trainer) else new

    def _export_all(
        self, trainer: Trainer, partner: QuantizationCallback, calls: Mapping[str, list[tuple[Example, Any]]]
    ) -> None:
        networks = partner.quantized
        several = isinstance(networks, Mapping)
        for slot, network in (networks if several else {next(iter(calls)): networks}).items():
            self._export(trainer, partner, slot, network, calls[slot], suffix=f"-{slot}" if several else "")
        console().print(export_table(list(self.results.values())))
        for logger in trainer.loggers:
            figures = {
                f"{key}/{name}": value for key, one in self.results.items() for name, value in one.figures().items()
            }
            logger.log_metrics(figures, trainer.global_step)
            if isinstance(logger, WandbLogger):
                for key, result in self.results.items():
                    if result.passed:
                        log_artifact(logger, f"{key}-network", result.files, result.figures())

    def _export(
        self,
        trainer: Trainer,
        partner: QuantizationCallback,
        slot: str,
        network: QuantizedNetwork,
        calls: list[tuple[Example, Any]],
        *,
        suffix: str,
    ) -> None:
        results = export_quantized(
            network,
            self._folder(trainer),
            self.formats,
            batches=[call for call, _ in calls],
            data=[batch for _, batch in calls],
            classes=numbers_of_classes(partner.slots[slot].pl_module),
            reference=partner.comparable(slot),
            float_network=partner.present_float(slot),
            min_agreement=self.min_agreement,
            min_sqnr_db=self.min_sqnr_db,
            name=f"model{suffix}",
        )
        self.results |= {f"{result.format}{suffix}": result for result in results}

    def _calls(
        self, trainer: Trainer, pl_module: LightningModule, partner: QuantizationCallback, slot: str
    ) -> list[tuple[Example, Any]]:
        """Return the network's calls in the LightningModule's step on real batches, with these batches."""
        network = partner.comparable(slot).to(pl_module.device)
        given = self.dataloader if holds_loader(self.dataloader) else evaluation_loaders(trainer)
        try:
            loader = calibration_loader(trainer, pl_module, given)
            with torch.inference_mode(False):
                found = calls_and_batches(pl_module, {slot: partner.slots[slot]}, {slot: network}, loader, self.batches)
        except QuantizationError as error:
            rank_zero_warn(f"Artifacts are compared on the example inputs only, because no batch could be run: {error}")
            return []
        here = move_data_to_device([(call.args, call.kwargs, batch) for call, batch in found[slot]], "cpu")
        return [(Example(args, kwargs), batch) for args, kwargs, batch in here]

    def _check(self, recipe: Recipe) -> None:
        if recipe.simulated:
            raise CombinationError(
                f"QuantizedModelExport needs an int8 network, and there is none: {recipe.simulated}."
            )
        check_formats(self.formats, recipe)

    def _folder(self, trainer: Trainer) -> Place:
        return place(self.dirpath) if self.dirpath is not None else join(place(trainer.default_root_dir), "export")


def exported(trainer: Trainer) -> Iterator[tuple[str, nn.Module, dict[str, float]]]:
    """Yield what a Trainer's `QuantizedModelExport` wrote and that passed: name, the artifact as a module, its figures.

    An artifact runs in its runtime's own process, which ends when the next one is requested. With several processes
    nothing is yielded, because only the first has artifacts and all processes test together.
    """
    if trainer.world_size > 1:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, QuantizedModelExport):
            continue
        for name, result in callback.results.items():
            if name == result.format and result.passed:
                with open_artifact(result) as network:
                    yield name, network, result.figures()
