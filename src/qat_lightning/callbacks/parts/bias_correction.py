"""Biases corrected in the middle of a fit, when fake-quantization is enabled."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from qat_lightning.callbacks.parts.between_processes import take_over_from_first
from qat_lightning.callbacks.parts.calibration_data import calibration_loader, calls_in_steps
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.recipes.bias_correction import correct_biases


def correct_biases_in_fit(trainer: Trainer, networks: Networks, batches: int) -> None:
    """Take the shift of the mean that rounded weights cause out of the biases.

    Args:
        trainer: While it fits.
        networks: The networks, which run as they are.
        batches: How many of the training's loader it is measured on.
    """
    module = trainer.lightning_module
    loader = calibration_loader(trainer, module, None)
    calls = calls_in_steps(module, networks.slots, networks.prepared, loader, batches)
    for name, prepared in networks.prepared.items():
        corrected = correct_biases(prepared, calls[name])
        rank_zero_info(f"{name!r}: the biases of {len(corrected)} layers were corrected.")
    if trainer.world_size > 1:
        take_over_from_first(networks.prepared)
