"""What the three modes have in common: one small protocol, and the values in which a mode answers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import nn

from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.graph.example import Example
from qat_lightning.settings.recipe import Recipe

EXCLUDED = "excluded"
"""The reason of a row that the recipe leaves out; nothing but `LayerCoverage.excluded` reads it."""


@dataclass(frozen=True)
class LayerCoverage:
    """Whether one layer of the float network, or an op between layers, is int8, and if not, why.

    Attributes:
        name: The layer; the op, behind the name of the module whose ``forward`` calls it.
        kind: Its type.
        quantized: Whether it is int8.
        reason: Why it stayed float; empty if it did not.
        what: A layer has weights; an op is all else that computes.
        calls: How often it runs in one call of the network; of a layer, 1.
        macs: Multiply-accumulates for one sample; None if it has none, or they were not counted.
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
        """Whether it is float because the recipe leaves it out."""
        return self.reason == EXCLUDED


@dataclass
class Converted:
    """What a mode makes of a prepared network.

    Attributes:
        network: The int8 module, on the CPU.
        coverage: Which layers became int8 and which stayed float.
        checks: The comparison with fake-quant, layer by layer.
        notes: What a user should be told, such as a fallback taken.
        operations: Likewise for the ops between the layers.
        whole: The comparison of the whole; None if there is no output to compare.
        parts: The names of the submodules that were converted, where not the whole was.
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
        """Put fake-quant into ``network``.

        Parameters are shared with ``network`` and keep their names, so that a float ``state_dict`` is a part of the
        prepared one. The result has a child ``_quantization`` of type `PreparedState`, which keeps a float copy.

        Raises:
            TraceError: The network cannot be captured in this mode.
            NetworkError: There is nothing in it to quantize.
        """
        ...

    def convert(self, prepared: nn.Module, example: Example) -> Converted:
        """Make an int8 network of ``prepared``, a CPU copy that may be used up, and verify it on ``example``.

        Raises:
            ConversionError: A range was never observed, or upstream's converter failed.
            VerificationError: A layer does not reproduce fake-quant within the backend's tolerance.
        """
        ...

    def coverage(self, prepared: nn.Module, example: Example) -> list[LayerCoverage]:
        """What of a prepared network conversion is going to make int8: a row for each layer, then one for each op.

        Args:
            prepared: A CPU copy in evaluation (`cpu_copy`), which may be used up.
            example: One call.
        """
        ...

    def parts(self, prepared: nn.Module) -> list[str]:
        """What of a prepared network can be left float by itself: layers by their names, and ops, as they run."""
        ...

    def leave_float(self, prepared: nn.Module, names: Collection[str], example: Example | None) -> None:
        """Leave some of `parts` float; called by `qat_lightning.modes.left_float.leave_float`, which notes why."""
        ...
