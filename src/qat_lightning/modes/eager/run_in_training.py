"""A network may run other layers in training than in evaluation; chains are what holds in both.

A layer's input is on the grid of the layer before it only if that layer ran. So the example runs in training mode as
well, and what one of the two runs contradicts is no chain: the layer then has a grid of its own for its input.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

from torch import nn

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.modes.eager.chains import Chain, find_chains
from qat_lightning.modes.eager.observation import observe
from qat_lightning.modes.prepared import copy_of_modules
from qat_lightning.settings.recipe import Recipe


def as_in_training(
    chains: list[Chain],
    network: nn.Module,
    example: Example,
    recipe: Recipe,
    prefix: str,
    *,
    heads: tuple[type[nn.Module], ...],
) -> list[Chain]:
    """The chains of a run in evaluation, without what a run in training contradicts.

    Args:
        chains: Found in evaluation.
        network: The float network; not changed.
        example: One call of it.
        recipe: Selects the layers.
        prefix: The network's own name.
        heads: Types of layers that begin a chain.
    """
    copied = copy_of_modules(network)  # whose code may count its calls in training
    state = random.getstate()
    try:
        observation = observe(copied, example, heads=heads, trains=True)
    except NetworkError:
        return chains  # training calls it otherwise, for example with targets: only evaluation can be observed
    finally:
        random.setstate(state)
    found, _ = find_chains(copied, observation, recipe, prefix)
    trained = {chain.name: chain for chain in found}
    idle = [
        join(prefix, chain.name) for chain in chains if chain.reached and not trained.get(chain.name, chain).reached
    ]
    if idle:
        warnings.warn(
            f"Called in evaluation, but not in training when the example ran: {', '.join(idle)}. A layer that no "
            "training step calls has no range, and stays float.",
            stacklevel=2,
        )
    return [_common(chain, trained.get(chain.name, chain)) for chain in chains]


def _common(chain: Chain, trained: Chain) -> Chain:
    """What two runs of a network have in common of the chain that begins with one layer."""
    if not (chain.reached and trained.reached):
        return chain
    if chain.batchnorm != trained.batchnorm:
        return replace(chain, batchnorm=None, activation=None, limit=None, grid_of=None)
    if chain.activation != trained.activation:
        chain = replace(chain, activation=None, limit=None)
    return replace(chain, grid_of=chain.grid_of if chain.grid_of == trained.grid_of else None)
