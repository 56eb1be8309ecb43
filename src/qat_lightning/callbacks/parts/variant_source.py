"""Where the variants of networks come from: training with fake-quantization, or calibration of copies."""

from __future__ import annotations

import copy
from typing import Protocol

from torch import nn

from qat_lightning.callbacks.parts.calibrated_copies import CalibratedCopies
from qat_lightning.callbacks.parts.float_weights import FloatWeights
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.modes.float_state import present_float
from qat_lightning.modes.left_float import leaving_float
from qat_lightning.modes.plain_attributes import set_attributes
from qat_lightning.modes.prepared import changed_attributes, copy_of_modules, cpu_copy, prepared_state
from qat_lightning.modes.sharded import blank_copy, is_sharded
from qat_lightning.rehearsal.faults import Conversion, convert_what_can_be, quantize_what_can_be
from qat_lightning.settings.recipe import Recipe

_EVALUATE = {"validate": "fake_quant", "test": "int8", "predict": "int8"}


class VariantSource(Protocol):
    """Provides the variants of networks; implemented for training and for post-training quantization.

    Attributes:
        in_place: The variant that is in the LightningModule itself.
        made_by: The calls that make an int8 network, for messages.
        made_in_fit: From when on a running fit has one, in a sentence.
    """

    in_place: str
    made_by: str
    made_in_fit: str

    def has(self, variant: str) -> bool:
        """Whether a variant exists or could be created; a failed conversion is not considered."""

    def why_not(self, variant: str) -> str:
        """Return the reason why a variant does not exist."""

    def default(self, stage: str) -> str:
        """Return the variant that a stage runs if the user chose none."""

    def ranges_seen(self) -> bool:
        """Whether fake-quantization has observed ranges."""

    def to_stand_in(self, name: str) -> nn.Module:
        """Return the network to run for the variant that is neither int8 nor in place."""

    def float_network(self, name: str) -> nn.Module:
        """Return the ``"float"`` variant, on the CPU, in evaluation mode."""

    def present_float(self, name: str) -> nn.Module:
        """Return the float network with the weights that the int8 network was converted from."""

    def comparable(self, name: str) -> nn.Module:
        """Return the network whose outputs the int8 network has to reproduce."""

    def reference(self, name: str) -> nn.Module | None:
        """Return the network that int8 is compared with in a test, if it is not in the LightningModule."""

    def untrained(self, name: str) -> nn.Module:
        """Return the float network as its code builds it, with any weights; eager int8 files are loaded into it."""

    def make_int8(self, name: str) -> tuple[Conversion, Recipe]:
        """Convert a network; return the conversion and its recipe."""


class TrainedVariants:
    """Variants after quantization-aware training: the LightningModule holds the networks with fake-quantization.

    Args:
        networks: The networks of the callback.
        floats: The float weights to compare with.
    """

    in_place = "fake_quant"
    made_by = "trainer.fit"
    made_in_fit = "A running fit has one after its first training step."

    def __init__(self, networks: Networks, floats: FloatWeights) -> None:
        self.networks = networks
        self._floats = floats

    def has(self, variant: str) -> bool:
        """See `VariantSource`."""
        if variant == "float":
            return bool(self._floats.weights)
        if variant == "fake_quant":
            return bool(self.networks.prepared)
        return self.networks.settings.convert_on_fit_end and self.ranges_seen() and not self.networks.simulated

    def why_not(self, variant: str) -> str:
        """See `VariantSource`."""
        if not self.networks.prepared:
            return "nothing was fitted or tested with this callback yet."
        if variant == "float":
            return (
                "fake-quantization was enabled from the first step, so there was no float training to compare with; "
                "give float_checkpoint=, or a later start."
            )
        if not self.networks.settings.convert_on_fit_end:
            return "convert_on_fit_end=False."
        return "no range was observed; fit first, or pass ckpt_path= of a fit with this callback."

    def default(self, stage: str) -> str:
        """See `VariantSource`."""
        return _EVALUATE[stage]

    def ranges_seen(self) -> bool:
        """See `VariantSource`."""
        return self.networks.know_a_range()

    def to_stand_in(self, name: str) -> nn.Module:
        """See `VariantSource`."""
        return self.float_network(name)

    def float_network(self, name: str) -> nn.Module:
        """See `VariantSource`."""
        return self._floats.network(name)

    def present_float(self, name: str) -> nn.Module:
        """See `VariantSource`."""
        with self.networks.whole():
            return present_float(self.networks.prepared[name])

    def comparable(self, name: str) -> nn.Module:
        """See `VariantSource`."""
        with self.networks.whole():
            return cpu_copy(self.networks.prepared[name])

    def reference(self, name: str) -> nn.Module | None:
        """See `VariantSource`."""
        return None

    def untrained(self, name: str) -> nn.Module:
        """See `VariantSource`."""
        prepared = self.networks.prepared[name]
        network = prepared_state(prepared).float_network
        if changed := changed_attributes(prepared):
            network = copy_of_modules(network)
            set_attributes(network, changed)
        return blank_copy(network) if is_sharded(prepared) else network

    def make_int8(self, name: str) -> tuple[Conversion, Recipe]:
        """See `VariantSource`."""
        return _converted(self.networks, name)


class CalibratedVariants:
    """Variants of post-training quantization: the LightningModule holds the float network.

    Args:
        networks: The networks of the callback.
        copies: Creates the calibrated copies.
    """

    in_place = "float"
    made_by = "trainer.test, trainer.predict or trainer.fit"
    made_in_fit = (
        "A running fit has one when training has ended: from on_train_end on, in the LightningModule and in callbacks "
        "listed after this one."
    )

    def __init__(self, networks: Networks, copies: CalibratedCopies) -> None:
        self.networks = networks
        self._copies = copies

    @property
    def _calibrates(self) -> bool:
        return self.networks.settings.kind == "static"

    def has(self, variant: str) -> bool:
        """See `VariantSource`."""
        if not self._copies.made_of or (variant == "fake_quant" and not self._calibrates):
            return False
        return variant != "int8" or not self.networks.simulated

    def why_not(self, variant: str) -> str:
        """See `VariantSource`."""
        if not self._copies.made_of:
            return "nothing was quantized with this callback yet."
        return f"kind={self.networks.settings.kind!r} has none."

    def default(self, stage: str) -> str:
        """See `VariantSource`."""
        return _EVALUATE[stage] if self._calibrates else "int8"

    def ranges_seen(self) -> bool:
        """See `VariantSource`."""
        return bool(self.networks.prepared)

    def to_stand_in(self, name: str) -> nn.Module:
        """See `VariantSource`."""
        return self.networks.prepared[name]

    def float_network(self, name: str) -> nn.Module:
        """See `VariantSource`."""
        return copy.deepcopy(self.networks.slots[name].get()).cpu().float().eval()

    def present_float(self, name: str) -> nn.Module:
        """See `VariantSource`."""
        return self.float_network(name)

    def comparable(self, name: str) -> nn.Module:
        """See `VariantSource`; the kinds without calibration are compared with float."""
        prepared = self.networks.prepared
        return cpu_copy(prepared[name]) if name in prepared else self.float_network(name)

    def reference(self, name: str) -> nn.Module | None:
        """See `VariantSource`."""
        return self.networks.prepared.get(name)

    def untrained(self, name: str) -> nn.Module:
        """See `VariantSource`."""
        return self.float_network(name)

    def make_int8(self, name: str) -> tuple[Conversion, Recipe]:
        """See `VariantSource`."""
        if self._calibrates:
            return _converted(self.networks, name)
        slot, example, network = self.networks.slots[name], self.networks.examples[name], self.float_network(name)
        decision = self.networks.decisions[name]
        self._copies.preparation.rework(network, slot, example)
        recipe = leaving_float(self.networks.settings.recipe_for(decision.mode), decision.left_float, slot.prefix)
        conversion = quantize_what_can_be(network, example, recipe, prefix=slot.prefix)
        return conversion, leaving_float(recipe, conversion.left_float, slot.prefix)


def _converted(networks: Networks, name: str) -> tuple[Conversion, Recipe]:
    """Convert a prepared network; return the conversion and its recipe."""
    prepared = networks.prepared[name]
    conversion = convert_what_can_be(prepared, networks.examples[name])
    state = prepared_state(prepared)
    return conversion, leaving_float(state.recipe, state.left_float, networks.slots[name].prefix)
