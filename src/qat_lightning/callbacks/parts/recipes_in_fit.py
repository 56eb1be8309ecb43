"""Recipes that read training batches during a fit, when fake-quantization is enabled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from qat_lightning.callbacks.parts.arguments import check_count
from qat_lightning.callbacks.parts.between_processes import copy_from_first_process
from qat_lightning.callbacks.parts.calibration_data import calibration_loader, calls_in_steps
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.recipes.bias_correction import correct_biases
from qat_lightning.recipes.sequential_mse import RangeSearch, sequential_mse


def apply_recipes_in_fit(trainer: Trainer, networks: Networks, counts: Mapping[str, int]) -> None:
    """Apply sequential MSE to the ranges of weights, and bias correction, as far as requested.

    Args:
        trainer: The Trainer, during a fit.
        networks: The networks, in their present phase.
        counts: Number of batches per recipe, see `counts_of_recipes`.
    """
    if "sequential_mse_batches" in counts:
        for name, calls in _calls(trainer, networks, counts["sequential_mse_batches"]).items():
            say_ranges(name, sequential_mse(networks.prepared[name], calls))
    if "bias_correction_batches" in counts:
        for name, calls in _calls(trainer, networks, counts["bias_correction_batches"]).items():
            corrected = correct_biases(networks.prepared[name], calls)
            rank_zero_info(f"{name!r}: the biases of {len(corrected)} layers were corrected.")
    if trainer.world_size > 1:
        copy_from_first_process(networks.prepared)


def _calls(trainer: Trainer, networks: Networks, batches: int) -> dict[str, list[Example]]:
    """Return the calls of the networks on the first batches of the training loader."""
    module = trainer.lightning_module
    loader = calibration_loader(trainer, module, None)
    return calls_in_steps(module, networks.slots, networks.prepared, loader, batches)


def counts_of_recipes(**counts: Any) -> dict[str, int]:
    """Return the number of training batches that each recipe reads, by argument name; zeros are omitted.

    Raises:
        ConfigurationError: A value is not an int of at least 0.
    """
    for name, count in counts.items():
        if count != 0 or type(count) is not int:
            check_count(name, count)
    return {name: count for name, count in counts.items() if count}


def refuse_without_ranges(kind: str, counts: Mapping[str, int]) -> None:
    """Raise if a recipe needs fixed activation ranges and the kind has none.

    Raises:
        ConfigurationError: The message names the recipe.
    """
    for name, count in counts.items():
        if kind != "static":
            raise ConfigurationError(
                f"{name}={count!r} needs activations with fixed ranges, which kind={kind!r} does not have: use 0."
            )


def say_ranges(name: str, found: dict[str, RangeSearch]) -> None:
    """Log for how many layers sequential MSE chose another range."""
    better = sum(result.after < result.before for result in found.values())
    rank_zero_info(f"{name!r}: sequential MSE chose other ranges for the weights of {better} of {len(found)} layers.")
