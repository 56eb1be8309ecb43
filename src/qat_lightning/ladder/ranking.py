"""Which layers quantization hurts most, for the rungs that leave some of them float."""

from __future__ import annotations

import torch

from qat_lightning.callbacks.parts.calibration_data import calls_in_steps
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.errors import QuantizationError
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.workshop import Workshop
from qat_lightning.sensitivity.measured import sensitivity

BATCHES = 4
"""Of the training data. Each is run twice for every layer."""


def rank_layers(workshop: Workshop, plan: Plan) -> tuple[tuple[str, ...], str]:
    """Rank layers by the SQNR of the outputs with one of them quantized alone; see `qat_lightning.sensitivity`.

    Args:
        workshop: What has the network and the data.
        plan: How layers are quantized.

    Returns:
        Globs of the layers, worst first, and why there are none, in words.
    """
    model, datamodule = workshop.copies()
    trainer = workshop.trainer([], [], enable_progress_bar=False, limit_val_batches=1)
    trainer.validate(model, datamodule=datamodule, verbose=False)  # ties them to a Trainer, whose hooks they then have
    datamodule.setup("fit")
    model.cpu()
    slot = Slot(model, workshop.name)
    network = workshop.network
    try:
        with torch.inference_mode(False):
            calls = calls_in_steps(
                model, {slot.name: slot}, {slot.name: network}, datamodule.train_dataloader(), BATCHES
            )
        found = sensitivity(
            network,
            calls[slot.name],
            mode=plan.mode,
            backend=plan.backend,
            scheme=plan.scheme,
            include=plan.include,
            exclude=plan.exclude,
            prefix=slot.prefix,
            kind=plan.kind,
        )
    except QuantizationError as error:
        return (), f"{type(error).__name__}: {error}"
    layers = [row.name for row in found.rows if row.excludable and row.parameters]
    return tuple(f"{slot.prefix}.{name}".strip(".") for name in layers), ""
