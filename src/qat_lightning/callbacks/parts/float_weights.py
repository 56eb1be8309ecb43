"""Weights of the ``"float"`` variant in quantization-aware training: kept during the fit, or read from a file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qat_lightning.callbacks.parts.checkpoint_io import read_float_state
from qat_lightning.callbacks.parts.checkpoints import read_float_weights
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.errors import ConfigurationError
from qat_lightning.modes.float_state import float_weights, frozen_beside_adapters
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.storage import Place


class FloatWeights:
    """Stores float weights for comparison with the quantized network.

    Args:
        networks: The networks of the callback.
        checkpoint: Checkpoint of a float run to read the weights from. None: keep the weights from when
            fake-quantization is enabled.

    Attributes:
        checkpoint: As given.
        weights: By network name and parameter name, on the CPU.
        source: Description of where the weights come from; empty if there are none.
        step: The step before which the weights were kept; None if they come from a file.
    """

    def __init__(self, networks: Networks, checkpoint: Place | None = None) -> None:
        self.networks = networks
        self.checkpoint = checkpoint
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.source = ""
        self.step: int | None = None

    def forget(self) -> None:
        """Discard them: they are of another network."""
        self.weights, self.source, self.step = {}, "", None

    def check(self, slots: Mapping[str, Slot]) -> None:
        """Check that the checkpoint belongs to this model, before anything is changed.

        Raises:
            CheckpointFileError: The file cannot be read.
            ConfigurationError: The file belongs to another model.
        """
        if self.checkpoint is not None:
            for name, slot in slots.items():
                read_float_weights(self.checkpoint, name, slot.prefix, slot.get().state_dict())

    def to_rehearse(self) -> Mapping[str, Any]:
        """Return weights closer to the trained ones than the current weights, for a rehearsal; may be empty."""
        return {} if self.checkpoint is None else read_float_state(self.checkpoint)

    def read(self) -> None:
        """Read the weights from the checkpoint, if given, equalized and folded like the networks."""
        if self.checkpoint is None:
            return
        for name, prepared in self.networks.prepared.items():
            state = prepared_state(prepared)
            reworking = state.reworking
            given = (state.float_network if reworking is None else reworking.given).state_dict()
            found = read_float_weights(self.checkpoint, name, self.networks.slots[name].prefix, given)
            self.weights[name] = found if reworking is None else reworking.rework(found)
        self.source = f"checkpoint {self.checkpoint}"

    def keep(self, step: int) -> None:
        """Keep the current weights, as those before ``step``, unless a checkpoint was given."""
        if self.checkpoint is None:
            with self.networks.whole():
                self.weights = {
                    name: float_weights(prepared, frozen_beside_adapters(prepared))
                    for name, prepared in self.networks.prepared.items()
                }
            self.step = step
            self.source = f"the weights before step {step}, when fake-quantization was enabled"

    def network(self, name: str) -> nn.Module:
        """Return a float network with these weights, on the CPU, in evaluation mode."""
        with self.networks.whole():
            return self._network(name)

    def _network(self, name: str) -> nn.Module:
        prepared = self.networks.prepared[name]
        network: nn.Module = copy.deepcopy(prepared_state(prepared).float_network).cpu()
        present = float_weights(prepared, set(self.weights[name]))  # frozen parameters; not stored a second time
        trained = sorted(present.keys() - frozen_beside_adapters(prepared))
        if trained:
            raise ConfigurationError(
                f"There is no float variant of {name!r}: {trained[0]!r} was frozen when fake-quantization was "
                "enabled, and is trained now. Give float_checkpoint=, or freeze it again."
            )
        network.load_state_dict(present | self.weights[name])
        return network.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints store."""
        return {"float_weights": self.weights, "float_source": self.source, "float_step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; a given ``checkpoint`` takes precedence."""
        self.step = state["float_step"]
        if self.checkpoint is None:
            self.weights = state["float_weights"]
            self.source = state["float_source"]
