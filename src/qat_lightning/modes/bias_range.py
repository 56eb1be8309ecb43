"""Weight scales for which each bias fits into 32 bits, in units of input scale times weight scale.

QNNPACK stores biases as such integers. A channel with a weight near zero, as a BatchNorm with weight 0 leaves it, has a
tiny scale, on which its bias would overflow.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.modules.utils import WeightedQuantizedModule

from qat_lightning.graph.example import Example
from qat_lightning.layers.inputs import input_of
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.numerics.grid import EPS

_LARGEST = 2.0**30
"""Half of what 32 bits hold: sums of products are added to a bias."""


def holding(scales: Tensor, weight: Tensor, bias: Tensor | None, in_scale: Any, out_scale: Any) -> Tensor:
    """Adjust weight scales so that the bias fits.

    Args:
        scales: Of the weight: one for each output channel, or one for all.
        weight: Float, output channels first.
        bias: Of shape ``(output channels,)``, or None.
        in_scale: The smallest scale of an input.
        out_scale: The scale of the output, which a channel without weight gets.

    Returns:
        Scales of the same shape, none smaller than before unless the channel's weight is zero.

    Example:
        >>> weight = torch.tensor([[1.0], [1e-9]])
        >>> holding(torch.tensor([0.1, 1e-10]), weight, torch.tensor([1.0, 1.0]), 0.5, 1.0)[1] > 1e-10
        tensor(True)
    """
    largest = weight.abs().flatten(1).amax(1) if scales.dim() else weight.abs().max()
    scales = torch.where(largest == 0, out_scale, scales)
    if bias is None:
        return scales
    needed = bias.abs() / (in_scale * _LARGEST)
    return torch.maximum(scales, needed if scales.dim() else needed.max()).clamp(min=EPS)


@torch.no_grad()
def hold_biases(network: nn.Module, example: Example) -> list[str]:
    """Pack the weights of torch's quantized layers again whose biases do not fit, on larger scales.

    Such a weight contributes next to nothing beside its bias, so rounding it more coarsely changes no output.

    Args:
        network: An int8 network; changed in place, and packed for the current engine.
        example: A call, in which the scales of inputs are read.

    Returns:
        The names of the layers that were packed again.
    """
    layers = {name: module for name, module in network.named_modules() if _might_overflow(module)}
    if not layers:
        return []
    seen: dict[str, list[float]] = {name: [] for name in layers}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[name].append(input_of(args, kwargs).q_scale())

    hooks = [layer.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run_apart(network, example)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, layer in layers.items() if seen[name] and _hold(layer, min(seen[name]))]


def _might_overflow(layer: Any) -> bool:
    """Whether a bias could overflow with the scale of an input; with those of nearly all networks none does."""
    if not isinstance(layer, WeightedQuantizedModule) or not hasattr(layer, "scale"):
        return False
    packed: Any = layer
    try:
        weight, bias = packed.weight(), packed.bias()
    except RuntimeError:  # QNNPACK's 3-d convolutions do not return their weights
        return False
    return bias is not None and bool((bias.abs() / scales_of(weight).float() > _NOTICED).any())


_NOTICED = 2.0**10
"""Overflows if the input's scale is below a millionth."""


def _hold(layer: Any, in_scale: float) -> bool:
    bias, scales, values = layer.bias(), scales_of(layer.weight()).float(), layer.weight().dequantize()
    wanted = torch.maximum(scales, holding(scales, values, bias, in_scale, scales))
    if torch.equal(wanted, scales):
        return False
    if scales.dim():
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        values = torch.quantize_per_channel(values, wanted.double(), zeros, 0, torch.qint8)
    else:
        values = torch.quantize_per_tensor(values, float(wanted), 0, torch.qint8)
    layer.set_weight_bias(values, bias)
    return True


def scales_of(weight: Tensor) -> Tensor:
    """The scales of one of torch's quantized weights, float64: one for each output channel, or one of no dimension."""
    per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    return weight.q_per_channel_scales() if per_channel else torch.tensor(weight.q_scale(), dtype=torch.float64)
