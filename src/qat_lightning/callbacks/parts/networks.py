"""The networks that a callback quantizes: where they are, what was decided of them, and what is on in them."""

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
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import cpu_copy, fake_quantizers, in_training_step, prepared_state, set_phase
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.registry import mode_for
from qat_lightning.modes.sharded import is_sharded, whole_copy
from qat_lightning.processes import is_first_process
from qat_lightning.rehearsal.auto import Decision
from qat_lightning.settings.schedule import Phase

BEFORE = Phase(fake_quant=False, observers=True, batchnorm_frozen=False, scales_learn=False)
"""The phase in which every fit begins."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One network of a LightningModule, for callbacks that go with the one that quantizes.

    Attributes:
        slot: Its place.
        prepared: The network with fake-quant.
        example: The call that it was prepared with.
    """

    slot: Slot
    prepared: nn.Module
    example: Example


class Networks:
    """What the parts of a callback know in common: its settings, and its networks by name.

    Args:
        settings: What the callback was told.
        phase: What is on in networks with fake-quant, to begin with.

    Attributes:
        settings: As given.
        phase: What is on now.
        slots: The places of the networks; empty before they are found.
        examples: A call of each.
        decisions: The mode of each, and what of it stays float.
        prepared: The networks with fake-quant; empty before there are some.
        compiled: Whether their training steps are going to be compiled.
    """

    def __init__(self, settings: QuantizationSettings, phase: Phase = BEFORE) -> None:
        self.settings = settings
        self.phase = phase
        self.slots: dict[str, Slot] = {}
        self.examples: dict[str, Example] = {}
        self.decisions: dict[str, Decision] = {}
        self.prepared: dict[str, nn.Module] = {}
        self.compiled = False

    def apply(self, phase: Phase) -> None:
        """Switch all networks to a phase, also if other code changed their flags."""
        self.phase = phase
        for prepared in self.prepared.values():
            set_phase(prepared, **dataclasses.asdict(phase))

    def let_batchnorm_move(self) -> None:
        """Let BatchNorm's statistics move for now, also where they are frozen."""
        for prepared in self.prepared.values():
            set_phase(prepared, **dataclasses.asdict(self.phase) | {"batchnorm_frozen": False})

    def in_training_step(self, begins: bool) -> None:
        """What a step computes belongs to the training, also where a part of a network is kept in evaluation."""
        for prepared in self.prepared.values():
            in_training_step(prepared, begins)

    @contextmanager
    def whole(self, *, everywhere: bool = True) -> Iterator[None]:
        """Within the block, networks whose parameters are sharded over processes are whole copies on the CPU.

        Where there are some, every process has to come by here at once; others are as they are. What a conversion
        leaves float within the block stays float in the networks themselves.

        Args:
            everywhere: Whether all processes get the copies; else only the first, and the others look at none.
        """
        sharded = {name: network for name, network in self.prepared.items() if is_sharded(network)}
        keep = everywhere or is_first_process()
        copies = {name: whole_copy(network, keep=keep) for name, network in sharded.items()}
        before, self.prepared = self.prepared, self.prepared | {n: c for n, c in copies.items() if c is not None}
        try:
            yield
        finally:
            self.prepared = before
        for name, copied in copies.items():
            if copied is not None:
                leave_float(sharded[name], prepared_state(copied).left_float, self.examples[name])

    def coverage(self, name: str) -> list[LayerCoverage]:
        """Determine what conversion is going to make int8 in a network."""
        with self.whole(), isolate_rng(include_cuda=torch.cuda.is_initialized()):
            prepared = self.prepared[name]
            return mode_for(prepared_state(prepared).recipe).coverage(cpu_copy(prepared), self.examples[name])

    def coverage_rows(self) -> list[LayerCoverage]:
        """The rows of all networks with fake-quant."""
        return [row for name in self.prepared for row in self.coverage(name)]

    @property
    def modes(self) -> dict[str, str]:
        """The mode of each network, once it is chosen."""
        made = {name: prepared_state(prepared).recipe.mode for name, prepared in self.prepared.items()}
        return {name: decision.mode for name, decision in self.decisions.items()} | made

    @property
    def first_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call that the (first) network was prepared with.

        Raises:
            ConfigurationError: There is none yet.
        """
        if not self.examples:
            raise ConfigurationError(
                "There are no example inputs yet: nothing was fitted or tested with this callback."
            )
        example = next(iter(self.examples.values()))
        return example.args, example.kwargs

    def parts(self) -> dict[str, Part]:
        """The networks with their places, as far as they are prepared."""
        return {
            name: Part(slot, self.prepared[name], self.examples[name])
            for name, slot in self.slots.items()
            if name in self.prepared
        }

    @property
    def simulated(self) -> str:
        """Why there can be no int8 network; empty if there can."""
        return next((why for p in self.prepared.values() if (why := prepared_state(p).recipe.simulated)), "")

    def know_a_range(self) -> bool:
        """Whether a range was observed in any of them, or needs not be."""
        return any(map(_knows_a_range, self.prepared.values()))

    def never_run(self) -> list[str]:
        """Of several networks those that were never run on finite values, where others were."""
        seen = {name: _knows_a_range(prepared) for name, prepared in self.prepared.items()}
        return [name for name, there in seen.items() if not there and any(seen.values())]


def _knows_a_range(prepared: nn.Module) -> bool:
    """A network that observes none, such as one of weight-only layers, needs none."""
    observed = [fq for _, fq in fake_quantizers(prepared) if fq.observed]
    return not observed or any(fq.seen for fq in observed)


def one_or_all(networks: dict[str, Any]) -> Any:
    """What a user gets of networks by name: the only one by itself, or None."""
    if not networks:
        return None
    return next(iter(networks.values())) if len(networks) == 1 else dict(networks)
