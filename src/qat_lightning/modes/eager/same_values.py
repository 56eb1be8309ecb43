"""Whether a network computes the same once its layers are prepared, and nothing is rounded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.modes.prepared import prepared_state, set_phase


def refuse_other_values(network: nn.Module, example: Example, expected: Any) -> None:
    """Compare a prepared network without rounding with the float network.

    Args:
        network: The prepared network.
        example: One call.
        expected: What the float network returned for it.

    Raises:
        NetworkError: The values differ, although two runs of the float network return the same ones.
    """
    set_phase(network, fake_quant=False, observers=True, batchnorm_frozen=False)
    actual = run_apart(network, example)
    set_phase(network, fake_quant=True, observers=True, batchnorm_frozen=False)
    if _alike(expected, actual):
        return
    name = type(network).__name__
    if _alike(expected, run_apart(prepared_state(network).float_network, example)):
        raise NetworkError(
            f"{name}.forward computes different values once its layers are prepared for quantization: it depends on "
            "the types or the number of its children (as self[-1] in an nn.Sequential does: name the parts with "
            "module= instead)."
        )
    warnings.warn(
        f"{name} returns something else in each evaluation of the same inputs, so that it cannot be checked whether "
        "it computes the same once its layers are prepared for quantization.",
        stacklevel=2,
    )


def float_tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of a result, in order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _alike(one: Any, other: Any) -> bool:
    return all(
        first.shape == second.shape and torch.allclose(first, second, rtol=1e-3, atol=1e-4, equal_nan=True)
        for first, second in zip(float_tensors(one), float_tensors(other), strict=True)
    )
