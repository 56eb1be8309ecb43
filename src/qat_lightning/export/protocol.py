"""What the formats have in common: one small protocol between them and what writes, loads, compares and times them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor, nn
from torch.export import ExportedProgram

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.export.spelling import Spelling
from qat_lightning.graph.example import Example
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.recipe import Recipe

Runner = Callable[[list[Tensor]], list[Tensor]]
"""A loaded artifact: the tensors of a call in, flat, and the tensors that come out, in the order of the signature."""


@dataclass(frozen=True)
class Kernels:
    """How many layers a file has on integers, and how many of them its runtime runs by an int8 kernel.

    Attributes:
        layers: Convolutions, linear layers and products that read integers alone.
        int8: How many of them are run on integers; the others on floats, which costs time and changes no result.
    """

    layers: int
    int8: int


@dataclass(frozen=True)
class Port:
    """An input or an output of a file that takes or returns integers where the network has floats.

    Attributes:
        kind: ``"input"`` or ``"output"``.
        place: Its place among the tensors of the call, from 0.
        dtype: Of the integers, such as ``"int8"``.
        scale: The size of a step; a float is ``scale * (integer - zero_point)``.
        zero_point: The integer that stands for 0.
    """

    kind: str
    place: int
    dtype: str
    scale: float
    zero_point: int

    def __str__(self) -> str:
        return f"{self.kind} {self.place}: {self.dtype}, scale {self.scale:.6g}, zero point {self.zero_point}"


class Source:
    """What is exported: an int8 network, or the float one that it is compared with in the same runtime.

    Args:
        network: The network, on the CPU.
        example: One real call, with a batch of 2 or more.
        recipe: Of the int8 network that a float one is compared with; by default the network's own.

    Attributes:
        network: As given.
        example: As given.
        recipe: As given, or the network's own; None for a float network by itself.
    """

    def __init__(self, network: nn.Module, example: Example, recipe: Recipe | None = None) -> None:
        self.network = network
        self.example = example
        self.recipe = recipe if self.quantized is None else self.quantized.recipe
        self._spelled: dict[Spelling, ExportedProgram] = {}

    @property
    def quantized(self) -> QuantizedNetwork | None:
        """The int8 network; None for a float one."""
        return self.network if isinstance(self.network, QuantizedNetwork) else None

    @property
    def is_direct(self) -> bool:
        """Whether the network is of a kind without calibration, with integer layers in it."""
        return self.quantized is not None and self.quantized.recipe.kind in DIRECT

    def spelled(self, spell: Spelling) -> ExportedProgram:
        """The same graph with the integer layers of the kinds without calibration written in one's own way.

        Args:
            spell: How; the graph is kept, for other formats that write them likewise.

        Raises:
            ExportError: A layer has no such form.
            TraceError: The network cannot be captured as a graph.
        """
        from qat_lightning.export.program import int8_program

        if self.quantized is None or not self.is_direct:
            return self.program
        if spell not in self._spelled:
            self._spelled[spell] = int8_program(self.quantized, self.example, spell)
        return self._spelled[spell]

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as one graph of aten ops with a dynamic batch; made when a format first asks for it.

        An int8 network has pairs of ``quantized_decomposed`` quantize and dequantize ops where its kernels read and
        write integers, and int8 weights behind a dequantize op each.

        Raises:
            ExportError: A kernel has no counterpart in such a graph.
            TraceError: The network cannot be captured as a graph.
        """
        from qat_lightning.export.program import float_program, int8_program

        if self.quantized is None:
            return float_program(self.network, self.example)
        return int8_program(self.quantized, self.example)


class Format(Protocol):
    """One file format and the runtime that runs it.

    Attributes:
        name: What the user types.
        suffix: Of the file, such as ``".onnx"``.
        runtime: The runtime in words, such as ``"ONNX Runtime"``.
        extra: The optional dependency it needs, as ``pip install qat-lightning[extra]`` names it.
        batch: The only batch size that its files take; None for any.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    runtime: ClassVar[str]
    extra: ClassVar[str | None]
    batch: ClassVar[int | None]

    def require(self) -> None:
        """Check that the packages it needs are installed.

        Raises:
            MissingExtraError: With the one line that installs them.
        """
        ...

    def refusal(self, recipe: Recipe) -> str:
        """Why networks of this recipe do not go into this format, and what to choose instead; empty if they do."""
        ...

    def write(self, source: Source, path: Path) -> None:
        """Write the file, which does not exist yet; what else it needs goes beside it.

        Raises:
            ExportError: The format or its runtime has no such op; the message names it.
        """
        ...

    def load(self, path: Path) -> Runner:
        """Load a file with the runtime itself, in a process that may know nothing of the network."""
        ...

    def ports(self, path: Path) -> tuple[Port, ...]:
        """The inputs and outputs of a file that are integers where the network has floats; empty for most formats.

        What `load` returns takes and gives floats all the same, and rounds and restores them itself.
        """
        ...

    def kernels(self, path: Path) -> Kernels | None:
        """How a loaded file's layers are run; None where its runtime does not tell, or runs all as they are written."""
        ...
