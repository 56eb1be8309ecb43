"""The networks that a callback quantizes: location, decisions and enabled phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.callbacks.parts.settings import QuantizationSettings
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.checksum import checksum
from qat_lightning.modes.coverage import under
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import cpu_copy, fake_quantizers, in_training_step, prepared_state, set_phase
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.registry import mode_for
from qat_lightning.modes.sharded import is_sharded, whole_copy
from qat_lightning.processes import is_first_process
from qat_lightning.rehearsal.auto import Decision
from qat_lightning.settings.schedule import Phase

BEFORE = Phase(fake_quant=False, observers=True, batchnorm_frozen=False, scales_learn=False)
"""The phase of a network that was just prepared."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One network of a LightningModule, for callbacks that work together with the quantizing one.

    Attributes:
        slot: Where the network is.
        prepared: The prepared network.
        example: The example call that it was prepared with.
    """

    slot: Slot
    prepared: nn.Module
    example: Example


class Networks:
    """State shared by the parts of a callback: its settings, and its networks by name.

    Args:
        settings: The settings of the callback.
        phase: The initial phase.

    Attributes:
        settings: As given.
        phase: The current phase.
        slots: Where the networks are; empty before they are found.
        examples: An example call of each network.
        decisions: The mode of each network, and which layers stay float.
        prepared: The prepared networks; empty before preparation.
        compiled: Whether their training steps will be compiled.
    """

    def __init__(self, settings: QuantizationSettings, phase: Phase = BEFORE) -> None:
        self.settings = settings
        self.phase = phase
        self.slots: dict[str, Slot] = {}
        self.examples: dict[str, Example] = {}
        self.decisions: dict[str, Decision] = {}
        self.prepared: dict[str, nn.Module] = {}
        self.compiled = False
        self._in_place_of: dict[str, nn.Module] = {}  # the sharded networks, while copies stand in `prepared`

    def apply(self, phase: Phase) -> None:
        """Switch all networks to a phase; flags are set even if they should be set already."""
        self.phase = phase
        for prepared in self.prepared.values():
            set_phase(prepared, **dataclasses.asdict(phase))

    def let_batchnorm_move(self) -> None:
        """Update BatchNorm's statistics for now, even if they are frozen."""
        for prepared in self.prepared.values():
            set_phase(prepared, **dataclasses.asdict(self.phase) | {"batchnorm_frozen": False})

    def in_training_step(self, begins: bool) -> None:
        """Mark the beginning or end of a training step, for parts of a network that stay in evaluation mode."""
        for prepared in self.prepared.values():
            in_training_step(prepared, begins)

    @contextmanager
    def whole(self, *, everywhere: bool = True) -> Iterator[None]:
        """Within the block, replace networks with sharded parameters by whole copies on the CPU.

        With sharded parameters this is a collective operation; other networks are not replaced. Layers that a
        conversion leaves float within the block stay float in the networks themselves.

        Args:
            everywhere: Whether all processes get the copies; otherwise only the first process does.
        """
        sharded = {name: network for name, network in self.prepared.items() if is_sharded(network)}
        keep = everywhere or is_first_process()
        copies = {name: whole_copy(network, keep=keep) for name, network in sharded.items()}
        before, self.prepared = self.prepared, self.prepared | {n: c for n, c in copies.items() if c is not None}
        outside, self._in_place_of = self._in_place_of, self._in_place_of | sharded
        try:
            yield
        finally:
            self.prepared, self._in_place_of = before, outside
        for name, copied in copies.items():
            if copied is not None:
                leave_float(sharded[name], prepared_state(copied).left_float, self.examples[name])

    def coverage(self, name: str) -> list[LayerCoverage]:
        """Predict which layers of a network conversion will make int8; names are relative to the LightningModule."""
        with self.whole(), isolate_rng(include_cuda=torch.cuda.is_initialized()):
            prepared = self.prepared[name]
            rows = mode_for(prepared_state(prepared).recipe).coverage(cpu_copy(prepared), self.examples[name])
        return under(self.slots[name].prefix, rows)

    def coverage_rows(self) -> list[LayerCoverage]:
        """Return the coverage rows of all prepared networks."""
        return [row for name in self.prepared for row in self.coverage(name)]

    @property
    def modes(self) -> dict[str, str]:
        """Return the mode of each network, once it is chosen."""
        made = {name: prepared_state(prepared).recipe.mode for name, prepared in self.prepared.items()}
        return {name: decision.mode for name, decision in self.decisions.items()} | made

    @property
    def first_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs that the (first) network was prepared with.

        Raises:
            ConfigurationError: No network has been prepared yet.
        """
        if not self.examples:
            raise ConfigurationError(
                "There are no example inputs yet: nothing was fitted or tested with this callback."
            )
        example = next(iter(self.examples.values()))
        return example.args, example.kwargs

    def parts(self) -> dict[str, Part]:
        """Return the prepared networks and their slots by name."""
        return {
            name: Part(slot, self.prepared[name], self.examples[name])
            for name, slot in self.slots.items()
            if name in self.prepared
        }

    @property
    def simulated(self) -> str:
        """Return why there can be no int8 network; empty if there can."""
        return next((why for p in self.prepared.values() if (why := prepared_state(p).recipe.simulated)), "")

    @property
    def sharded(self) -> bool:
        """Whether processes share the parameters of a network; within `whole` they have copies of their own."""
        return any(map(is_sharded, self.prepared.values()))

    def checksums(self) -> dict[str, int]:
        """Return a checksum of each network's weights and ranges; within `whole` not those of the copies."""
        return {name: checksum(prepared) for name, prepared in (self.prepared | self._in_place_of).items()}

    def know_a_range(self) -> bool:
        """Whether some network has an observed range, or needs none."""
        return any(map(_knows_a_range, self.prepared.values()))

    def never_run(self) -> list[str]:
        """Return networks that have never run on finite values, if others have."""
        seen = {name: _knows_a_range(prepared) for name, prepared in self.prepared.items()}
        return [name for name, there in seen.items() if not there and any(seen.values())]


def _knows_a_range(prepared: nn.Module) -> bool:
    """Whether a network has observed ranges; one without observers, such as a weight-only network, needs none."""
    observed = [fq for _, fq in fake_quantizers(prepared) if fq.observed]
    return not observed or any(fq.seen for fq in observed)


def one_or_all(networks: dict[str, Any]) -> Any:
    """Return the only network by itself, several as a dict by name, and None for no network."""
    if not networks:
        return None
    return next(iter(networks.values())) if len(networks) == 1 else dict(networks)
