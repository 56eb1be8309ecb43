"""Copying packed weights, grids and all other values from the trained network to the int8 network of mode eager."""

from __future__ import annotations

import torch
from torch import nn

from qat_lightning.layers.integer import IntegerLayer
from qat_lightning.layers.qat_modules import round_for_good
from qat_lightning.modes.bias_range import holding
from qat_lightning.modes.eager.calls import grids_of
from qat_lightning.modes.eager.int8 import Int8Layer
from qat_lightning.modes.eager.layers import ChainHead


def int8_layers(network: nn.Module) -> dict[str, Int8Layer]:
    """The int8 layers of a network by name, including additional names of shared layers."""
    modules = network.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, Int8Layer)}


@torch.no_grad()
def fill(layer: Int8Layer, head: ChainHead) -> None:
    """Pack the present weight, rounded as in training, and copy the grids."""
    scale, zero_point = head.output_fake_quant.calculate_qparams()
    layer.op.scale, layer.op.zero_point = float(scale), int(zero_point)
    in_scale = None
    if head.input_grid.seen:
        in_scale, in_zero_point = head.input_grid.calculate_qparams()
        layer.input_scale.copy_(in_scale)
        layer.input_zero_point.copy_(in_zero_point)
    in_scales = [] if in_scale is None else [in_scale]
    for number, grids in enumerate(head.grids[1:]):
        # Calls that training never made use the grids of the first call.
        layer.later_grids[number] = grids_of(grids if grids.output_fake_quant.seen else head)
        in_scales += [value for value in layer.later_grids[number, :1].float() if value > 0]
    weight, bias = head.folded()
    fq = head.weight_fake_quant
    weight = round_for_good(weight, fq)
    scales, _ = fq.calculate_qparams()
    scales = holding(scales, weight, bias, min(in_scales, default=scale), scale)
    if fq.per_channel:
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        packed = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
    else:
        packed = torch.quantize_per_tensor(weight, float(scales), 0, torch.qint8)
    layer.op.set_weight_bias(packed, bias)


def load_rest(network: nn.Module, prepared: nn.Module) -> None:
    """Load all trained values outside of int8 layers into the int8 network, through a strict ``state_dict``."""
    layers = int8_layers(network)
    tables = [n for n, module in network.named_modules(remove_duplicate=False) if isinstance(module, IntegerLayer)]
    inside = tuple(f"{name}." if name else "" for name in (*layers, *tables))
    packed = {layer: layer._modules.pop("op") for layer in set(layers.values())}  # loading would pack them again
    try:
        trained, state = prepared.state_dict(), network.state_dict()
        state.update({key: trained[key] for key in state if not key.startswith(inside)})
        network.load_state_dict(state)
    finally:
        for layer, op in packed.items():
            layer._modules["op"] = op
    buffers = dict(prepared.named_buffers())
    for name, buffer in network.named_buffers():
        if name not in state and name in buffers:
            buffer.data = buffers[name].detach().clone()
