"""Changes that recipes make to a float network before preparation, and to float weights that are loaded later."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from qat_lightning.graph.example import Example
from qat_lightning.recipes.equalization import equalize
from qat_lightning.recipes.folding import Folded, fold_batchnorm
from qat_lightning.recipes.rotation import rotate
from qat_lightning.recipes.smoothquant import smooth
from qat_lightning.settings.recipe import Recipe


def reworks(recipe: Recipe) -> bool:
    """Whether a recipe changes the float network."""
    return (
        recipe.equalization != "none"
        or recipe.batchnorm != "fused"
        or recipe.smoothquant is not None
        or recipe.rotation
    )


class Reworking:
    """The original float network, and the changes made to it.

    Args:
        network: The float network, changed in place; a copy of its original state is kept.
        example: One call of it.
        recipe: The recipe that determines the changes.

    Attributes:
        notes: Descriptions of the changes.
        folded: The folded BatchNorms, by name.

    Raises:
        NetworkError: The network would compute different values afterwards.
        ConfigurationError: There is nothing to fold.
    """

    def __init__(self, network: nn.Module, example: Example, recipe: Recipe) -> None:
        self.given = copy.deepcopy(network)
        self.example = example
        self.recipe = recipe
        self.notes, self.folded = _rework(network, example, recipe)

    def rework(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a ``state_dict`` of the original network to one of the changed network."""
        network = copy.deepcopy(self.given)
        network.load_state_dict(weights)
        _rework(network, self.example, self.recipe)
        return dict(network.state_dict())


def _rework(network: nn.Module, example: Example, recipe: Recipe) -> tuple[list[str], Folded]:
    notes: list[str] = []
    folded: Folded = {}
    # Equalize first: BatchNorm's beta and gamma take the factors, and are folded with them.
    if recipe.equalization != "none":
        notes.append(f"Before it was prepared: {equalize(network, example, recipe.equalization)}")
    if recipe.batchnorm == "fold":
        folded = fold_batchnorm(network, example)
        notes.append(f"Before it was prepared: {len(folded)} BatchNorms were folded.")
    if recipe.rotation:
        notes.append(f"Before it was prepared: {rotate(network, example)}")
    # Last, because it uses the activations of the network that is quantized.
    if recipe.smoothquant is not None:
        notes.append(f"Before it was prepared: {smooth(network, example, recipe.smoothquant)}")
    return notes, folded
