"""Folding BatchNorm into the layers before it, in a float network: what inference gains without any quantization."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example, from_user
from qat_lightning.layers.batchnorm import folded_parameters
from qat_lightning.modes.eager.chains import Chain, find_chains, observe, run_apart
from qat_lightning.modes.prepared import is_prepared
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe

LEAST_DB = 80.0
"""What a folded network must reach against the network itself: float32 arithmetic in another order is at 110 dB and
more, a BatchNorm that should not have been folded at less than 40."""


def fuse(network: nn.Module, example_inputs: Any) -> tuple[nn.Module, int]:
    """Fold each BatchNorm that follows a convolution or a linear layer into it, for inference in float.

    Which follows which is found by running the network once on the example, as conversion in eager mode does: a
    BatchNorm is folded only where it takes the output of one layer, and nothing else does. The result computes what the
    network computes in evaluation mode, which is checked on the example; it is not for training on.

    Where ``forward`` takes different ways for different inputs, the example must take the one that counts.

    Args:
        network: A float network; it is left as it is.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs of its ``forward``, with a
            batch dimension; or a `qat_lightning.graph.example.Example`.

    Returns:
        A folded copy in evaluation mode, an `nn.Identity` in the place of each folded BatchNorm; and how many were
        folded.

    Raises:
        NetworkError: The network does not run on the example, is prepared for quantization, or computes something else
            once it is folded.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
        >>> fused, count = fuse(network, torch.randn(2, 3, 8, 8))
        >>> count, [type(layer).__name__ for layer in fused]
        (1, ['Conv2d', 'Identity', 'ReLU', 'BatchNorm2d'])
    """
    if is_prepared(network):
        raise NetworkError(
            f"{type(network).__name__} is prepared for quantization, and folds BatchNorm itself when it is converted: "
            "give the float network."
        )
    example = example_inputs if isinstance(example_inputs, Example) else from_user(example_inputs)
    fused = copy.deepcopy(network).eval()
    observation = observe(fused, example)
    chains, _ = find_chains(fused, observation, Recipe("eager", "x86"), "", int8=False)
    modules = dict(fused.named_modules(remove_duplicate=False))
    folded = [chain for chain in chains if chain.batchnorm is not None]
    for chain in folded:
        _fold(modules, chain)
    try:
        result = run_apart(fused, example)
    except Exception as error:
        raise NetworkError(
            f"{type(network).__name__} does not run once {len(folded)} BatchNorm layers are folded, which its forward "
            f"looks at: {type(error).__name__}: {error}"
        ) from error
    expected, actual = _tensors(observation.result), _tensors(result)
    worst = min((sqnr_db(one, other) for one, other in zip(expected, actual, strict=True)), default=LEAST_DB)
    if not worst >= LEAST_DB:
        raise NetworkError(
            f"{type(network).__name__} computes something else once {len(folded)} BatchNorm layers are folded "
            f"({worst:.1f} dB from the network itself, where {LEAST_DB:.0f} is the least): its forward reads what was "
            "folded, or does not compute the same twice."
        )
    return fused, len(folded)


def _fold(modules: dict[str, nn.Module], chain: Chain) -> None:
    layer: Any = modules[chain.name]
    assert chain.batchnorm is not None
    bn = modules[chain.batchnorm]
    layer.weight, layer.bias = folded_parameters(layer, bn)
    identity = nn.Identity().eval()
    # Under every name that it has.
    for name in [name for name, module in modules.items() if module is bn]:
        parent, _, leaf = name.rpartition(".")
        modules[parent]._modules[leaf] = identity


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
