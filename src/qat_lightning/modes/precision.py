"""Networks in precisions other than float32, which int8 grids require."""

from __future__ import annotations

import copy

import torch
from torch import nn

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example, in_float32
from qat_lightning.modes.eager.observation import run_apart


def refuse_mixed(network: nn.Module, example: Example) -> None:
    """Refuse a network of mixed precision that fails in float32: conversion casts all layers to float32.

    Args:
        network: The float network.
        example: One call.

    Raises:
        NetworkError: It fails in float32; the message names the layers.
    """
    dtypes = _dtypes(network)
    if len(dtypes) < 2:
        return
    try:
        run_apart(copy.deepcopy(network).float(), in_float32(example))
    except Exception as error:
        layers = {
            name.rpartition(".")[0]: str(parameter.dtype)
            for name, parameter in network.named_parameters()
            if parameter.is_floating_point() and parameter.dtype != torch.float32
        }
        named = ", ".join(f"{layer!r} ({dtype})" for layer, dtype in list(layers.items())[:8])
        raise NetworkError(
            f"{type(network).__name__} has layers of several precisions, {named}, and does not run with all of them "
            f"in float32, which is what an int8 network is made from ({type(error).__name__}: {error}). What to do: "
            "let its forward cast to the dtype of the layer (x.to(self.layer.weight.dtype)), or quantize a part of it "
            "with module=."
        ) from error


def refuse_other_precision(network: nn.Module) -> None:
    """Refuse a network without float32 tensors: quantizers of mode pt2e annotate only float32.

    Args:
        network: The float network.

    Raises:
        NetworkError: It has no float32 tensor.
    """
    dtypes = _dtypes(network)
    if dtypes and torch.float32 not in dtypes:
        raise NetworkError(
            f"The parameters of {type(network).__name__} are {', '.join(sorted(map(str, dtypes)))}, and mode='pt2e' "
            "quantizes float32 only. What to do: prepare network.float() with an example in float32, and set the "
            "precision of the training afterwards, as Trainer(precision=...) does; or use mode='fx'."
        )


def _dtypes(network: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()}
