"""Recipes that read batches in the middle of a fit, when fake-quantization is enabled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from qat_lightning.callbacks.parts.arguments import check_count
from qat_lightning.callbacks.parts.between_processes import take_over_from_first
from qat_lightning.callbacks.parts.calibration_data import calibration_loader, calls_in_steps
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.recipes.bias_correction import correct_biases
from qat_lightning.recipes.sequential_mse import RangeSearch, sequential_mse


def win_back_in_fit(trainer: Trainer, networks: Networks, counts: Mapping[str, int]) -> None:
    """Choose the ranges of weights by the outputs of layers, and take the shift of rounded weights out of the biases.

    Args:
        trainer: While it fits.
        networks: The networks, which run as they are.
        counts: See `counts_of_recipes`.
    """
    if "sequential_mse_batches" in counts:
        for name, calls in _calls(trainer, networks, counts["sequential_mse_batches"]).items():
            say_ranges(name, sequential_mse(networks.prepared[name], calls))
    if "bias_correction_batches" in counts:
        for name, calls in _calls(trainer, networks, counts["bias_correction_batches"]).items():
            corrected = correct_biases(networks.prepared[name], calls)
            rank_zero_info(f"{name!r}: the biases of {len(corrected)} layers were corrected.")
    if trainer.world_size > 1:
        take_over_from_first(networks.prepared)


def _calls(trainer: Trainer, networks: Networks, batches: int) -> dict[str, list[Example]]:
    """What the first batches of the training's loader call the networks with."""
    module = trainer.lightning_module
    loader = calibration_loader(trainer, module, None)
    return calls_in_steps(module, networks.slots, networks.prepared, loader, batches)


def counts_of_recipes(**counts: Any) -> dict[str, int]:
    """Number of batches of the training loader that each recipe reads, by the name of its argument; without zeros.

    Raises:
        ConfigurationError: It is no such number.
    """
    for name, count in counts.items():
        if count != 0 or type(count) is not int:
            check_count(name, count)
    return {name: count for name, count in counts.items() if count}


def refuse_without_ranges(kind: str, counts: Mapping[str, int]) -> None:
    """Refuse recipes for fixed ranges of activations where there are none.

    Raises:
        ConfigurationError: Which it is.
    """
    for name, count in counts.items():
        if kind != "static":
            raise ConfigurationError(
                f"{name}={count!r} needs activations with fixed ranges, which kind={kind!r} does not have: use 0."
            )


def say_ranges(name: str, found: dict[str, RangeSearch]) -> None:
    """Say of how many layers another range gives a better output."""
    better = sum(result.after < result.before for result in found.values())
    rank_zero_info(f"{name!r}: sequential MSE chose other ranges for the weights of {better} of {len(found)} layers.")
