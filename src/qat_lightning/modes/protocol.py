"""The interface of all modes: a small protocol and its result types."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import nn

from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.graph.example import Example
from qat_lightning.settings.recipe import Recipe

EXCLUDED = "excluded"
"""Reason in rows of layers that the recipe excludes; read only by `LayerCoverage.excluded`."""


@dataclass(frozen=True)
class LayerCoverage:
    """Whether one layer of the float network, or an op between layers, is int8, and if not, why.

    Attributes:
        name: The layer; for an op, its name after the name of the module whose ``forward`` calls it.
        kind: Its type.
        quantized: Whether it is int8.
        reason: Why it stayed float; empty if it did not.
        what: ``"layer"`` for layers with weights, ``"op"`` for everything else that computes.
        calls: Number of calls in one run of the network; 1 for a layer.
        macs: Multiply-accumulates per sample; None if it has none, or they were not counted.
    """

    name: str
    kind: str
    quantized: bool
    reason: str = ""
    what: Literal["layer", "op"] = "layer"
    calls: int = 1
    macs: int | None = None

    @property
    def excluded(self) -> bool:
        """Whether it is float because the recipe excludes it."""
        return self.reason == EXCLUDED


@dataclass
class Converted:
    """The result of converting a prepared network.

    Attributes:
        network: The int8 module, on the CPU.
        coverage: Which layers became int8 and which stayed float.
        checks: The comparison with fake-quant, layer by layer.
        notes: Messages for the user, such as a fallback that was used.
        operations: Coverage of the ops between the layers.
        whole: The comparison of the whole network; None if there is no output to compare.
        parts: Names of the converted submodules, if the network was not converted as a whole.
    """

    network: nn.Module
    coverage: list[LayerCoverage]
    checks: list[LayerCheck] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    operations: list[LayerCoverage] = field(default_factory=list)
    whole: WholeCheck | None = None
    parts: tuple[str, ...] = ()


class Mode(Protocol):
    """One mode: plain modules in, plain modules out, no Lightning."""

    def prepare(self, network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "") -> nn.Module:
        """Insert fake-quant into ``network``.

        Parameters are shared with ``network`` and keep their names, so a float ``state_dict`` is a subset of the
        prepared one. The result has a child ``_quantization`` of type `PreparedState`, which keeps a float copy.

        Raises:
            TraceError: The network cannot be captured in this mode.
            NetworkError: There is nothing in it to quantize.
        """
        ...

    def convert(self, prepared: nn.Module, example: Example) -> Converted:
        """Convert ``prepared``, a CPU copy that may be modified, to an int8 network, and verify it on ``example``.

        Raises:
            ConversionError: A range was never observed, or upstream's converter failed.
            VerificationError: A layer does not reproduce fake-quant within the backend's tolerance.
        """
        ...

    def coverage(self, prepared: nn.Module, example: Example) -> list[LayerCoverage]:
        """What conversion is going to make int8: one row per layer, then one per op.

        Args:
            prepared: A CPU copy in evaluation (`cpu_copy`), which may be modified.
            example: One call.
        """
        ...

    def parts(self, prepared: nn.Module) -> list[str]:
        """Names of the layers and ops of a prepared network that can be left float individually, in execution order."""
        ...

    def leave_float(self, prepared: nn.Module, names: Collection[str], example: Example | None) -> None:
        """Leave some of `parts` float; called by `qat_lightning.modes.left_float.leave_float`, which stores why."""
        ...
