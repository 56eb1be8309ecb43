"""Bias correction: rounded weights shift the mean of a layer's output, and its bias is corrected by that shift.

Nagel et al., 2019, https://arxiv.org/abs/1906.04721, section 4.2, with means from data (appendix D).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.modes.float_state import float_weights
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.recipes.inputs import samples_of
from qat_lightning.recipes.layers import RoundedLayer, rounded_layers
from qat_lightning.rehearsal.calibration import call


class _Shift:
    """The mean, over all outputs of a float layer, of the error from rounding its weight."""

    def __init__(self, error: Tensor) -> None:
        self.error = error
        self.sum = torch.zeros(error.shape[0], dtype=torch.float64, device=error.device)
        self.count = 0

    def see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook on the float layer."""
        added = apply_layer(module, samples_of(module, args, kwargs), self.error)
        channels = added.movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1)
        self.sum += channels.double().sum(1)
        self.count += channels.shape[1]

    def mean(self) -> Tensor:
        return (self.sum / max(self.count, 1)).float()


@torch.no_grad()
def correct_biases(
    prepared: nn.Module, batches: Iterable[Any], reference: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Subtract the mean error of rounded weights from each layer's output, per channel, in place.

    Each layer is measured on the float network's own inputs, so errors of other layers have no influence. If BatchNorm
    is folded into a layer, its beta is corrected. Weights and ranges of activations do not change.

    Args:
        prepared: The network with fake-quant, calibrated or not; fake-quantization is enabled.
        batches: Calls of the network, as for `qat_lightning.calibrate`, on its device.
        reference: The float network's ``state_dict``, if the weights were changed since; by default the present
            weights.

    Returns:
        For each corrected layer by name, the largest correction of a channel, in the units of the layer's output.
        Layers without a bias to correct are left out.

    Example:
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> network, x = nn.Sequential(nn.Linear(4, 2)), torch.rand(8, 4)
        >>> prepared = get_mode("fx").prepare(network, Example((x,)), Recipe("fx", "x86"))
        >>> list(correct_biases(prepared, [x]))
        ['0']
    """
    network = copy.deepcopy(prepared_state(prepared).float_network)
    network.load_state_dict(reference if reference is not None else float_weights(prepared))
    device = next((parameter.device for parameter in prepared.parameters()), torch.device("cpu"))
    network.to(device).float().eval()
    layers = [(layer, bias) for layer in rounded_layers(prepared) if (bias := _bias_of(layer)) is not None]
    shifts = [_Shift(layer.rounded() - layer.folded(network.get_submodule(layer.name))) for layer, _ in layers]
    handles = [
        network.get_submodule(layer.name).register_forward_hook(shift.see, with_kwargs=True)
        for (layer, _), shift in zip(layers, shifts, strict=True)
    ]
    try:
        for batch in batches:
            call(network, batch)
    finally:
        for handle in handles:
            handle.remove()
    corrections = {}
    for (layer, bias), shift in zip(layers, shifts, strict=True):
        if shift.count:
            correction = shift.mean()
            bias.sub_(correction.to(bias.dtype))
            corrections[layer.name] = float(correction.abs().max())
    return corrections


def apply_layer(module: Any, input: Tensor, weight: Tensor) -> Tensor:
    """The output of a convolution or linear layer with another weight and without bias."""
    if isinstance(module, nn.Linear):
        return F.linear(input, weight)
    output: Tensor = module._conv_forward(input, weight, None)
    return output


def _bias_of(layer: RoundedLayer) -> Tensor | None:
    """The parameter that is added to each channel after the product with the folded weight."""
    owner: Any = layer.module if layer.batchnorm is None else layer.network.get_submodule(layer.batchnorm)
    bias: Tensor | None = owner.bias
    return bias
