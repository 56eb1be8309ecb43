"""What is measured on a few batches: where the error comes from, how large it is, sensitive layers, bits per layer."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from torch import nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.graph.signature import batch_size
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.workshop import Workshop
from qat_lightning.modes.registry import mode_for
from qat_lightning.recipes.bias_correction import correct_biases
from qat_lightning.recipes.reworking import Reworking, reworks
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.sensitivity import BitLimits, bits_within
from qat_lightning.sensitivity.measured import OutputSqnr, sensitivity
from qat_lightning.sensitivity.switches import Switches
from qat_lightning.settings.recipe import Recipe

BATCHES = 4
"""Batches of the training data to calibrate on; the sources of the error and estimates are measured on all of them."""

SAMPLES = 16
"""Samples on which each layer is ranked, at least, in whole batches."""

CANDIDATES = (2, 3, 4, 6, 8)
"""The numbers of bits to choose from."""


def find_sources(workshop: Workshop, plan: Plan) -> dict[str, float]:
    """Measure how much of the error comes from weights and how much from activations.

    The network is prepared and calibrated on a few batches. It then runs with only its weights and with only its
    activations fake-quantized.

    Args:
        workshop: Has the network and the data.
        plan: How the network is quantized; recipes that need calibration data are left out.

    Returns:
        The fields of `qat_lightning.ladder.sources.ErrorSources`.

    Raises:
        QuantizationError: It cannot be measured, with the reason.
    """
    calls = workshop.calls(BATCHES)
    metric = OutputSqnr(workshop.network, calls)
    prepared = _prepared(workshop, plan, calls)
    switches = Switches(prepared)
    found = {}
    for what in ("weights", "activations"):
        switches.only_of(what)
        found[f"{what}_db"] = metric(prepared)
    if not all(map(math.isfinite, found.values())):
        raise ConfigurationError(f"the quantized network computes values that are not finite ({found})")
    return found


def output_sqnr(workshop: Workshop, plan: Plan) -> float:
    """Measure how close a plan's network comes to the float one, without converting or validating it.

    The network is prepared, calibrated and corrected on a few batches, on which its fake-quantized outputs are compared
    with the float ones.

    Args:
        workshop: Has the network and the data.
        plan: How the network is quantized; one that is `qat_lightning.ladder.estimates.estimable`.

    Returns:
        The SQNR of the outputs in decibels.

    Raises:
        QuantizationError: It cannot be measured, with the reason.
    """
    calls = workshop.calls(BATCHES)
    prepared = _prepared(workshop, plan, calls)
    if plan.bias_correction:
        correct_biases(prepared, copy.deepcopy(calls))
    return OutputSqnr(workshop.network, calls)(prepared)


def _prepared(workshop: Workshop, plan: Plan, calls: list[Example]) -> nn.Module:
    """The network with fake-quantization by a plan, calibrated."""
    scheme = replace(plan.scheme, learned_step="none") if plan.scheme.learned else plan.scheme
    recipe = Recipe(
        plan.mode,
        plan.backend,
        scheme,
        plan.include,
        plan.exclude,
        kind=plan.kind,
        equalization=plan.equalization,
        smoothquant=plan.smoothquant,
        rotation=plan.rotation,
    )
    network = workshop.network
    if reworks(recipe):
        Reworking(network, calls[0], recipe)
    prepared = mode_for(recipe).prepare(network, calls[0], recipe, prefix=workshop.prefix)
    calibrate(prepared, copy.deepcopy(calls))
    return prepared


def rank_layers(workshop: Workshop, plan: Plan) -> tuple[str, ...]:
    """Rank layers by the SQNR of the outputs with one of them quantized alone, as `qat_lightning.sensitivity` does.

    Args:
        workshop: Has the network and the data.
        plan: How layers are quantized; recipes that need calibration data are left out.

    Returns:
        Globs of the layers, worst first.

    Raises:
        QuantizationError: Layers cannot be ranked, with the reason.
    """
    calls = workshop.calls(BATCHES)
    metric = OutputSqnr(workshop.network, calls[: math.ceil(SAMPLES / (batch_size(calls[0]) or 1))])
    prepared = _prepared(workshop, plan, calls)
    switches, found = Switches(prepared), {}
    for unit in switches.units:
        if unit.module and unit.parameters:
            switches.only([unit.name])
            found[unit.name] = metric(prepared)
    return tuple(join(workshop.prefix, name) for name in sorted(found, key=found.__getitem__))


def choose_bits(workshop: Workshop, plan: Plan, max_size_mb: float) -> dict[str, Any]:
    """Choose the bits of each layer within a size; see `qat_lightning.sensitivity.bits_within`.

    Args:
        workshop: Has the network and the data.
        plan: How layers are quantized otherwise.
        max_size_mb: The size limit of the int8 network's file, in 10^6 bytes.

    Returns:
        The ``overrides`` of a `qat_lightning.Scheme`.

    Raises:
        QuantizationError: Bits cannot be chosen, with the reason, such as a missing package.
    """
    measured = sensitivity(
        workshop.network,
        workshop.calls(BATCHES),
        mode=plan.mode,
        backend=plan.backend,
        scheme=plan.scheme,
        include=plan.include,
        exclude=plan.exclude,
        prefix=workshop.prefix,
        kind=plan.kind,
    )
    return dict(bits_within(measured, CANDIDATES, BitLimits(max_size_mb=max_size_mb)).overrides)
