"""Checking that a float network computes the same after its weights were changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.modes.eager.observation import run_apart

Change = TypeVar("Change")

SAME = 1e-4
"""Largest relative change of outputs that counts as equal; float32 rounding alone causes smaller ones."""


def outputs_of(network: nn.Module, example: Example) -> list[Tensor]:
    """The floating tensors that a network returns, in evaluation and in float64."""
    return floating(run_apart(network, example))


def floating(outputs: Any) -> list[Tensor]:
    """The floating tensors in a result, in float64."""
    leaves = tree_leaves(outputs)
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest relative difference between two results; inf if they are not finite."""
    distances = [
        float((left - right).norm() / left.norm().clamp(min=1e-12)) for left, right in zip(one, other, strict=True)
    ]
    return max((d if math.isfinite(d) else math.inf for d in distances), default=0.0)


def passing(
    network: nn.Module, example: Example, changes: list[Change], apply: Callable[[list[Change]], None]
) -> list[Change]:
    """The changes after which a network computes the same: tried together, and one at a time if that fails.

    Args:
        network: The network; its parameters are restored after each trial.
        example: One call of it.
        changes: The changes to try.
        apply: Makes some of them in the network's parameters.
    """
    before = outputs_of(network, example)

    def passes(tried: list[Change]) -> bool:
        kept = [(parameter, parameter.clone()) for parameter in network.parameters()]
        try:
            apply(tried)
            return distance(before, outputs_of(network, example)) <= SAME
        finally:
            for parameter, value in kept:
                parameter.copy_(value)

    if not changes or passes(changes):
        return changes
    return [change for change in changes if passes([change])]


@contextmanager
def undone_if_different(network: nn.Module, example: Example, *, by: str, remedy: str) -> Iterator[None]:
    """Restore a network's weights after the block if it computes different values with those that the block gave it.

    Args:
        network: The network.
        example: One call of it.
        by: The recipe that changes the weights, for the message.
        remedy: The setting that disables the recipe.

    Raises:
        NetworkError: It computes different values.
    """
    before, weights = outputs_of(network, example), copy.deepcopy(network.state_dict())
    yield
    change = distance(before, outputs_of(network, example))
    if not change <= 10 * SAME:
        network.load_state_dict(weights)
        raise NetworkError(
            f"{by} would change what {type(network).__name__} computes, by {change:.1e} on the example, and was "
            f"undone. Use {remedy} for it."
        )


def named(left: Mapping[str, str]) -> str:
    """The first few layers that a recipe did not change, each with the reason.

    Example:
        >>> named({"first": "gelu", "last": "an input of the network"})
        'first (gelu), last (an input of the network)'
    """
    return ", ".join(f"{name} ({why})" for name, why in list(left.items())[:3]) + (", …" if len(left) > 3 else "")
