"""Folding BatchNorm into the weights of a float network, before training or for inference.

Jacob et al., 2018, https://arxiv.org/abs/1712.05877, section 3.2, fold during training, with the batch's statistics.
Nagel et al., 2021, "A white paper on neural network quantization", https://arxiv.org/abs/2106.08295, section 5.2,
compare this with folding before training, with fixed statistics: as good or better from a trained network, and cheaper.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.graph.example import Example, few_samples, from_user
from qat_lightning.layers.batchnorm import folded_parameters
from qat_lightning.modes.eager.chains import Chain, find_chains
from qat_lightning.modes.eager.following import batchnorm_behind
from qat_lightning.modes.eager.observation import HEAD_TYPES, Observation, observe, run_apart
from qat_lightning.modes.prepared import is_prepared
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe

LEAST_DB = 80.0
"""Least SQNR of a folded network against the network itself: float32 arithmetic in another order gives 110 dB and more,
a BatchNorm that should not have been folded less than 40.
"""


class FoldedBatchNorm(nn.Module):
    """Replaces a BatchNorm that was folded; not an ``nn.Identity``, which graphs would keep as an op."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input``."""
        return input


Folded = dict[str, dict[str, Any]]
"""For each folded BatchNorm by name: the layer it was folded into, whether that had a bias, and eps."""


@torch.no_grad()
def fold_batchnorm(network: nn.Module, example: Example) -> Folded:
    """Fold each BatchNorm into the convolution or linear layer before it, in place.

    Which BatchNorm follows which layer is found by running the example. Layers without a bias get one.

    Args:
        network: A float network with trained statistics.
        example: One call of it.

    Returns:
        What was folded, as plain values.

    Raises:
        ConfigurationError: There is nothing to fold.
        NetworkError: The network does not run on the example.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        >>> fold_batchnorm(network, Example((torch.randn(2, 3, 8, 8),)))
        {'1': {'layer': '0', 'bias': False, 'eps': 1e-05, 'affine': True, 'counted': True}}
        >>> network
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
          (1): FoldedBatchNorm()
        )
    """
    observation = observe(network, example)
    names = {module: name for name, module in network.named_modules()}
    folded: Folded = {}
    for layer, name in names.items():
        batchnorm = _behind(layer, observation)
        if batchnorm is not None and "weight" in layer._parameters:
            folded[names[batchnorm]] = _fold(layer, batchnorm, name)
    if not folded:
        raise ConfigurationError(
            f"batchnorm='fold' finds no BatchNorm in {type(network).__name__} that follows a convolution or linear "
            "layer: use batchnorm='fused'."
        )
    for name in folded:
        batchnorm = network.get_submodule(name)
        for parent in list(network.modules()):
            for child, module in list(parent._modules.items()):
                if module is batchnorm:
                    parent._modules[child] = FoldedBatchNorm().train(batchnorm.training)
    return folded


def _behind(layer: nn.Module, observation: Observation) -> Any:
    """The BatchNorm to fold into a layer that is called once; None if other code reads the layer's weight."""
    once = type(layer) in HEAD_TYPES and len(observation.of(layer)) == 1 and not observation.reads(layer)
    return batchnorm_behind(layer, observation) if once else None


def _fold(layer: Any, bn: Any, name: str) -> dict[str, Any]:
    had_bias = layer.bias is not None
    weight, bias = folded_parameters(layer, bn)
    # The weight stays the same parameter.
    layer.weight.copy_(weight)
    if had_bias:
        layer.bias.copy_(bias)
    else:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=layer.weight.requires_grad)
    return {
        "layer": name,
        "bias": had_bias,
        "eps": float(bn.eps),
        "affine": bn.weight is not None,
        "counted": bn.num_batches_tracked is not None,
    }


def unfold_state(state: dict[str, Any], folded: Mapping[str, Mapping[str, Any]], prefix: str = "") -> None:
    """Add entries for folded BatchNorms to a ``state_dict``; these then only add the bias.

    Args:
        state: The ``state_dict`` of the folded network, changed in place; afterwards the float network can load it
            strictly, and is equivalent to the folded one in evaluation.
        folded: Result of `fold_batchnorm`.
        prefix: Prefix of the network's keys.
    """
    for name, values in folded.items():
        layer = prefix + values["layer"]
        bias: Tensor = state[f"{layer}.bias"]
        if not values["bias"]:
            del state[f"{layer}.bias"]
        # The part that the layer cannot add is added by BatchNorm: by its beta, or without one by its running mean.
        added = torch.zeros_like(bias) if values["bias"] else bias
        bn = f"{prefix}{name}"
        if values["affine"]:
            state[f"{bn}.weight"], state[f"{bn}.bias"] = torch.ones_like(bias), added
        state[f"{bn}.running_mean"] = torch.zeros_like(bias) if values["affine"] else -added
        state[f"{bn}.running_var"] = torch.full_like(bias, 1 - values["eps"])
        if values["counted"]:
            state[f"{bn}.num_batches_tracked"] = torch.tensor(1)


def fuse(network: nn.Module, example_inputs: Any) -> tuple[nn.Module, int]:
    """Fold each BatchNorm that follows a convolution or a linear layer into it, for inference in float.

    Pairs are found by running the network once on the example, as in eager mode: a BatchNorm is folded only if it is
    the only consumer of one layer's output. The result equals the network in evaluation mode, which is checked on the
    example; it is not for further training.

    Where ``forward`` depends on its inputs, the example must take the path that matters.

    Args:
        network: A float network; not changed.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs of its ``forward``, with a
            batch dimension; or a `qat_lightning.graph.example.Example`.

    Returns:
        A folded copy in evaluation mode, with an `nn.Identity` in place of each folded BatchNorm; and how many were
        folded.

    Raises:
        NetworkError: The network does not run on the example, is prepared for quantization, or computes different
            values once it is folded.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
        >>> fused, count = fuse(network, torch.randn(2, 3, 8, 8))
        >>> count, [type(layer).__name__ for layer in fused]
        (1, ['Conv2d', 'Identity', 'ReLU', 'BatchNorm2d'])
    """
    if is_prepared(network):
        raise NetworkError(
            f"{type(network).__name__} is prepared for quantization, and its BatchNorm is folded at conversion: give "
            "the float network."
        )
    example = example_inputs
    if not isinstance(example, Example):
        example = few_samples(network, from_user(example))
    fused = copy.deepcopy(network).eval()
    observation = observe(fused, example)
    chains, _ = find_chains(fused, observation, Recipe("eager", "x86"), "", int8=False)
    modules = dict(fused.named_modules(remove_duplicate=False))
    folded = [chain for chain in chains if chain.batchnorm is not None]
    for chain in folded:
        _fold_away(modules, chain)
    try:
        result = run_apart(fused, example)
    except Exception as error:
        raise NetworkError(
            f"{type(network).__name__} does not run once {len(folded)} BatchNorm layers are folded, because its "
            f"forward uses them: {type(error).__name__}: {error}"
        ) from error
    expected, actual = _tensors(observation.result), _tensors(result)
    worst = min((sqnr_db(one, other) for one, other in zip(expected, actual, strict=True)), default=LEAST_DB)
    if not worst >= LEAST_DB:
        raise NetworkError(
            f"{type(network).__name__} computes different values once {len(folded)} BatchNorm layers are folded "
            f"({worst:.1f} dB from the network itself, where {LEAST_DB:.0f} is the least): its forward reads the "
            "folded layers, or is not deterministic."
        )
    return fused, len(folded)


def _fold_away(modules: dict[str, nn.Module], chain: Chain) -> None:
    layer: Any = modules[chain.name]
    assert chain.batchnorm is not None
    bn = modules[chain.batchnorm]
    layer.weight, layer.bias = folded_parameters(layer, bn)
    identity = nn.Identity().eval()
    # Under all of its names.
    for name in [name for name, module in modules.items() if module is bn]:
        parent, _, leaf = name.rpartition(".")
        modules[parent]._modules[leaf] = identity


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
