"""Compiled training steps, with one graph between two switches of the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule

from qat_lightning.callbacks.parts.network import OWN_FORWARD
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.modes.compiling import CompiledSteps, refuse_compile
from qat_lightning.modes.prepared import prepared_state


class CompiledTraining:
    """Runs the training steps of networks compiled while it is active.

    Args:
        networks: The networks.
    """

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self._steps: list[CompiledSteps] = []

    def begin(self, pl_module: LightningModule) -> None:
        """Start running compiled."""
        for name, slot in self.networks.slots.items():
            prepared = self.networks.prepared[name]
            refuse_compile(prepared_state(prepared).recipe.mode)  # also if the checkpoint is of a run without compiling
            owner = pl_module if slot.name == OWN_FORWARD else prepared
            self._steps.append(CompiledSteps(prepared, owner, name))

    def switched(self) -> None:
        """The schedule switched something: the next step compiles a new graph."""
        for steps in self._steps:
            steps.switched()

    def end(self) -> None:
        """Stop running compiled."""
        for steps in self._steps:
            steps.remove()
        self._steps = []

    @contextmanager
    def paused(self, pl_module: LightningModule) -> Iterator[None]:
        """Run uncompiled within the block; compiled again after it if it was before."""
        compiled = bool(self._steps)
        self.end()
        yield
        if compiled:
            self.begin(pl_module)
