"""A prepared network with ranges in the state that callback parts share, without a fit."""

from __future__ import annotations

from typing import Any

import torch

from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.callbacks.parts.preparation import Preparation
from qat_lightning.callbacks.parts.settings import QuantizationSettings
from qat_lightning.graph.example import examples_from_user
from qat_lightning.rehearsal.auto import Decision
from qat_lightning.settings.schedule import Phase
from tests.callbacks.lit import Lit, dataset

IMAGES = dataset()[:32][0]


def placed(mode: str = "fx", *, observed: bool = True, **settings: Any) -> tuple[Lit, Networks]:
    """A LightningModule with its network prepared and fake-quantization enabled, and the state that parts share."""
    torch.manual_seed(0)
    lit, networks = Lit(), Networks(QuantizationSettings(mode, "x86", **settings))
    slot = Slot(lit, "net")
    networks.slots, networks.decisions = {"net": slot}, {"net": Decision(mode)}
    networks.examples = examples_from_user(IMAGES[:4], ["net"])
    prepared = Preparation(networks).prepare_one(slot, slot.get(), networks.examples["net"])
    slot.install(prepared)
    networks.prepared = {"net": prepared}
    if observed:
        networks.apply(networks.phase)
        prepared.train()(IMAGES)
    networks.apply(Phase(fake_quant=True, observers=False, batchnorm_frozen=True))
    return lit.eval(), networks
