"""What is measured of the layers: which quantization hurts most, and how many bits each is worth within a size."""

from __future__ import annotations

from typing import Any

from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.workshop import Workshop
from qat_lightning.sensitivity import BitLimits, bits_within
from qat_lightning.sensitivity.measured import Sensitivity, sensitivity

BATCHES = 4
"""Of the training data. Each is run twice for every layer."""

CANDIDATES = (2, 3, 4, 6, 8)
"""Numbers of bits that a layer may get."""


def rank_layers(workshop: Workshop, plan: Plan) -> tuple[str, ...]:
    """Rank layers by the SQNR of the outputs with one of them quantized alone; see `qat_lightning.sensitivity`.

    Args:
        workshop: What has the network and the data.
        plan: How layers are quantized.

    Returns:
        Globs of the layers, worst first.

    Raises:
        QuantizationError: They cannot be ranked, with the reason.
    """
    found = _measured(workshop, plan)
    layers = [row.name for row in found.rows if row.excludable and row.parameters]
    return tuple(f"{found.prefix}.{name}".strip(".") for name in layers)


def choose_bits(workshop: Workshop, plan: Plan, max_size_mb: float) -> dict[str, Any]:
    """Choose the bits of each layer within a size; see `qat_lightning.sensitivity.bits_within`.

    Args:
        workshop: What has the network and the data.
        plan: How layers are quantized otherwise.
        max_size_mb: Of the int8 network's file.

    Returns:
        For ``Scheme(overrides=)``.

    Raises:
        QuantizationError: They cannot be chosen, with the reason; a package may be missing.
    """
    return dict(bits_within(_measured(workshop, plan), CANDIDATES, BitLimits(max_size_mb=max_size_mb)).overrides)


def _measured(workshop: Workshop, plan: Plan) -> Sensitivity:
    """The layers of the float network, on a few batches of the training data."""
    return sensitivity(
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
