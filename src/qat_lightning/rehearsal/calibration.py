"""Calibration: the ranges of activations from a few batches, without any training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qat_lightning.errors import ConversionError
from qat_lightning.graph.example import example_of
from qat_lightning.modes.prepared import fake_quantizers, observe_in_evaluation, set_phase


@contextmanager
def calibrating(prepared: nn.Module) -> Iterator[None]:
    """Within the block, a prepared network determines its ranges again, from all inputs that it is called with.

    Within the block, it computes like the float network in evaluation mode. Afterwards the ranges are chosen,
    fake-quantization is enabled, and ranges and BatchNorm statistics are frozen; it stays in evaluation mode.

    Args:
        prepared: The result of a mode's ``prepare``.

    Raises:
        ConversionError: No input was finite.
    """
    for _, fq in fake_quantizers(prepared):
        fq.forget()
    prepared.eval()
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=True)
    observe_in_evaluation(prepared, True)
    try:
        with torch.no_grad():
            yield
    finally:
        observe_in_evaluation(prepared, False)
        set_phase(prepared, fake_quant=True, observers=False, batchnorm_frozen=True)
    observed = [fq for _, fq in fake_quantizers(prepared) if fq.observed]
    if observed and not any(fq.seen for fq in observed):
        raise ConversionError(
            "Calibration saw no finite activation: give it at least one batch of real data, and check the data and "
            "the weights for NaN."
        )
    for fq in observed:
        fq.settle()


def calibrate(prepared: nn.Module, batches: Iterable[Any]) -> int:
    """Determine the ranges of a prepared network from batches.

    Args:
        prepared: A network from `prepare`; changed in place, and in evaluation mode afterwards.
        batches: Inputs of the network, each an `Example`, a tuple of positional inputs, a mapping of keyword inputs, or
            one tensor, on the device of the network.

    Returns:
        The number of batches.

    Raises:
        ConversionError: There was no batch, or none with finite values.

    Example:
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> network, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(8, 4)
        >>> prepared = get_mode("fx").prepare(network, Example((x,)), Recipe("fx", "x86", kind="static"))
        >>> calibrate(prepared, [x, torch.randn(8, 4)])
        2
    """
    count = 0
    with calibrating(prepared):
        for batch in batches:
            call(prepared, batch)
            count += 1
    return count


def call(network: nn.Module, batch: Any) -> Any:
    """Call a network with an `Example`, a tuple of positional inputs, a mapping of keyword inputs, or one tensor."""
    given = example_of(batch)
    return network(*given.args, **given.kwargs)
