"""The callback that re-estimates BatchNorm statistics when training ends, before the network becomes int8."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qat_lightning.callbacks.parts.arguments import check_count
from qat_lightning.callbacks.parts.calibration_data import calibration_loader, run_in_steps
from qat_lightning.callbacks.parts.steps import has_trained
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import ConfigurationError
from qat_lightning.recipes.batchnorm import BatchNormStatistics, has_batchnorm


class BatchNormReestimation(Callback):
    """Replaces BatchNorm's running statistics by those of the trained network, when training ends.

    Use it with `QuantizationAwareTraining`. With the final weights and fake-quantization enabled, batches go through
    ``training_step`` without gradients; each BatchNorm normalizes with the batch's statistics, and the mean and
    variance of all values become its running statistics. Then the network is converted.

    Source: Nagel et al., 2022, https://arxiv.org/abs/2203.11086, after Sun et al., 2019.

    Args:
        batches: Largest number of batches; more are better, and cost one forward each.
        dataloader: Where they come from; by default the training loader.

    Raises:
        ConfigurationError: A setting is invalid; at construction.

    Example:
        >>> BatchNormReestimation(batches=100).batches
        100
    """

    def __init__(self, batches: int = 50, dataloader: Any = None) -> None:
        check_count("batches", batches)
        self.batches = batches
        self.dataloader = dataloader

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse networks without BatchNorm before anything is trained."""
        parts = QuantizationAwareTraining.of(trainer, self).parts()
        if not any(has_batchnorm(part.prepared) for part in parts.values()):
            raise ConfigurationError(
                f"BatchNormReestimation: {', '.join(map(repr, parts))} holds no BatchNorm with running statistics. "
                "Leave the callback out."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-estimate while the LightningModule is on its device, before ``on_fit_end`` converts."""
        parts = QuantizationAwareTraining.of(trainer, self).parts()
        if not has_trained(trainer):
            return
        loader = calibration_loader(trainer, pl_module, self.dataloader)
        networks = {name: part.prepared for name, part in parts.items()}
        slots = {name: part.slot for name, part in parts.items()}
        found = {name: BatchNormStatistics(network) for name, network in networks.items() if has_batchnorm(network)}
        of = {networks[name]: statistics for name, statistics in found.items()}
        count = run_in_steps(
            pl_module,
            {name: slots[name] for name in found},
            {name: networks[name] for name in found},
            loader,
            self.batches,
            lambda network: of[network].collecting(),
        )
        # Outside: what ran in steps puts every buffer back.
        for statistics in found.values():
            statistics.apply()
        rank_zero_info(f"BatchNorm statistics were re-estimated on {count} batches.")
