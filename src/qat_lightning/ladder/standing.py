"""The callback that lets a Trainer evaluate an int8 network, loaded from its file, in place of the float one."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from qat_lightning.callbacks.parts.network import OWN_FORWARD, OwnForward, Slot
from qat_lightning.callbacks.parts.variants import Guests, Stand, numbers_of_classes
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.measure.fidelity import Fidelity


class StandingIn(Guests, Callback):
    """Evaluates the float network of a LightningModule, or an int8 network in its place.

    It has the interface that `qat_lightning.evaluate_variants` requires of a callback, so that the final comparison is
    of the saved network.

    Args:
        slot: The place of the float network.
        network: The network to run instead, on the CPU; None for float only.
        example: One call of it, on the CPU; None for float only.

    Attributes:
        variants: ``"float"``, and ``"int8"`` if there is a network.
        slots: The place of the float network, by its name.
        chosen_variant: The variant to run; None for int8 if there is one.
        fidelity: After a test of int8, how close it is to float.
        float_source: Where the float weights come from, in words.
    """

    def __init__(self, slot: Slot, network: nn.Module | None, example: Example | None) -> None:
        self.slot, self.slots = slot, {slot.name: slot}
        self.variants: tuple[str, ...] = ("float",) if network is None else ("float", "int8")
        self.chosen_variant: str | None = None
        self.fidelity: dict[str, float] = {}
        self.float_source = "the weights that were quantized"
        self.example_inputs_ = ((), {}) if example is None else (example.args, example.kwargs)
        self._network = network
        self._before: list[Any] = []
        self._compared: Fidelity | None = None

    def use_variant(self, name: str | None) -> None:
        """Choose the variant to run.

        Raises:
            ConfigurationError: There is no such variant.
        """
        if name is not None and name not in self.variants:
            raise ConfigurationError(f"There is no variant {name!r}: use {' or '.join(map(repr, self.variants))}.")
        self.chosen_variant = name

    def network(self, name: str) -> nn.Module:
        """A variant, on the CPU, in evaluation mode."""
        if name == "int8" and self._network is not None:
            return self._network
        return copy.deepcopy(self.slot.get()).cpu().eval()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the network in place of the float one."""
        self._stand_in(compared=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the float network back."""
        self._stand_back()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the network in place of the float one, and compare the two."""
        self._stand_in(compared=self._guest is None)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the labels of the batch into account, for the comparison."""
        if self._compared is not None:
            self._compared.data = batch

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the float network back, and keep the fidelity of int8."""
        if self._compared is not None:
            self.fidelity = self._compared.compute()
        self._stand_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the float network back after an exception."""
        self._stand_back()

    def _stand_in(self, *, compared: bool) -> None:
        other = self._guest or (None if self.chosen_variant == "float" else self._network)
        if other is None:
            return
        own = self.slot.name == OWN_FORWARD
        plain = OwnForward(self.slot.pl_module) if own else self.slot.get()
        self._compared = Fidelity(classes=numbers_of_classes(self.slot.pl_module)) if compared else None
        dtype = self.slot.dtype
        stand = Stand(other, plain, on_cpu=True, fidelity=self._compared, reference=plain, dtype=dtype)
        self._before.append(self.slot.run_instead(stand))

    def _stand_back(self) -> None:
        while self._before:
            self.slot.run_again(self._before.pop())
        self._compared = None
