"""The weights of the ``"float"`` variant of a quantization-aware training: kept, or read from a file."""

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
    """Keeps float weights to compare with.

    Args:
        networks: Whose weights.
        checkpoint: A file of a float run to take them from, instead of the weights when fake-quantization was enabled.

    Attributes:
        checkpoint: As given.
        weights: By name of the network and of the parameter, on the CPU.
        source: Where they come from, in words; empty if there are none.
        step: The step before which they were taken; None if from elsewhere.
    """

    def __init__(self, networks: Networks, checkpoint: Place | None = None) -> None:
        self.networks = networks
        self.checkpoint = checkpoint
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.source = ""
        self.step: int | None = None

    def check(self, slots: Mapping[str, Slot]) -> None:
        """Refuse a file that is of another model, before anything is changed.

        Raises:
            CheckpointFileError: It cannot be read.
            ConfigurationError: It is of another model.
        """
        if self.checkpoint is not None:
            for name, slot in slots.items():
                read_float_weights(self.checkpoint, name, slot.prefix, slot.get().state_dict())

    def to_rehearse(self) -> Mapping[str, Any]:
        """Weights that are nearer to the trained ones than those of the present network, if there are some."""
        return {} if self.checkpoint is None else read_float_state(self.checkpoint)

    def read(self) -> None:
        """Take the weights from the file, if there is one, as the networks were reworked."""
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
        """Keep the present weights, unless a file has better ones, as those before a step."""
        if self.checkpoint is None:
            with self.networks.whole():
                self.weights = {
                    name: float_weights(prepared, frozen_beside_adapters(prepared))
                    for name, prepared in self.networks.prepared.items()
                }
            self.step = step
            self.source = f"the weights before step {step}, when fake-quantization was enabled"

    def network(self, name: str) -> nn.Module:
        """A float network with these weights, on the CPU, in evaluation."""
        with self.networks.whole():
            return self._network(name)

    def _network(self, name: str) -> nn.Module:
        prepared = self.networks.prepared[name]
        network: nn.Module = copy.deepcopy(prepared_state(prepared).float_network).cpu()
        present = float_weights(prepared, set(self.weights[name]))  # of what is frozen; else there is nothing else
        trained = sorted(present.keys() - frozen_beside_adapters(prepared))
        if trained:
            raise ConfigurationError(
                f"There is no float variant of {name!r}: {trained[0]!r} was frozen when fake-quantization was "
                "enabled, and is trained now. Give float_checkpoint=, or freeze it again."
            )
        network.load_state_dict(present | self.weights[name])
        return network.eval()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"float_weights": self.weights, "float_source": self.source, "float_step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`; what the file has goes before."""
        self.step = state["float_step"]
        if self.checkpoint is None:
            self.weights = state["float_weights"]
            self.source = state["float_source"]
