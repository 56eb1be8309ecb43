"""The protocol between export formats and the code that writes, loads, compares and times files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor, nn
from torch.export import ExportedProgram

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.export.completion import Completion
from qat_lightning.export.spelling import Spelling
from qat_lightning.graph.example import Example
from qat_lightning.graph.inference_call import inference_example
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.recipe import Recipe

Runner = Callable[[list[Tensor]], list[Tensor]]
"""A loaded artifact: maps the flat tensors of a call to the output tensors, in the order of the signature."""


@dataclass(frozen=True)
class Kernels:
    """How many layers of a file have only integer inputs, and how many of them the runtime runs as int8 kernels.

    Attributes:
        layers: Number of convolutions, linear layers and products with only integer inputs.
        int8: How many of them run on integers. The others run in float, which is slower but gives the same results.
    """

    layers: int
    int8: int


@dataclass(frozen=True)
class Port:
    """An integer input or output of a file, where the network has floats.

    Attributes:
        kind: ``"input"`` or ``"output"``.
        place: Position among the tensors of the call, from 0.
        dtype: The integer type, such as ``"int8"``.
        scale: The step size; a float is ``scale * (integer - zero_point)``.
        zero_point: The integer that represents 0.
    """

    kind: str
    place: int
    dtype: str
    scale: float
    zero_point: int

    def __str__(self) -> str:
        return f"{self.kind} {self.place}: {self.dtype}, scale {self.scale:.6g}, zero point {self.zero_point}"


class Source:
    """The network to export: an int8 network, or the float one that it is compared with in the same runtime.

    Files are for inference: inputs that only the loss of an int8 network reads, such as labels, are left out.

    Args:
        network: The network, on the CPU.
        example: One real call, with a batch size of 2 or more.
        recipe: For a float network, the recipe of the int8 network; by default the network's own.

    Attributes:
        network: As given, without the inputs of its loss.
        example: As given, without them.
        completion: Computes the loss from what the network returns; None if it has no such inputs.
        recipe: As given, or the network's own; None for a float network by itself.
    """

    def __init__(self, network: nn.Module, example: Example, recipe: Recipe | None = None) -> None:
        self.completion: Completion | None = None
        if isinstance(network, QuantizedNetwork):
            self.completion = Completion.of(network, example)
            network = network if self.completion is None else network.at_inference()
        self.network = network
        self.example = self.at_inference(example)
        self.recipe = recipe if self.quantized is None else self.quantized.recipe
        self._spelled: dict[Spelling, ExportedProgram] = {}

    def at_inference(self, example: Example) -> Example:
        """A call without the inputs of the loss."""
        return example if self.completion is None else inference_example(self.completion.call, example)

    @property
    def quantized(self) -> QuantizedNetwork | None:
        """The int8 network; None for a float one."""
        return self.network if isinstance(self.network, QuantizedNetwork) else None

    @property
    def is_direct(self) -> bool:
        """Whether the network is of a kind without calibration and contains integer layers."""
        return self.quantized is not None and self.quantized.recipe.kind in DIRECT

    def spelled(self, spell: Spelling) -> ExportedProgram:
        """Return the graph with integer layers of the kinds without calibration written in a given way.

        Args:
            spell: How to write them; the graph is cached for other formats with the same one.

        Raises:
            ExportError: A layer is not supported.
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
        """Return the network as one graph of aten ops with a dynamic batch size; created when first needed.

        An int8 network has pairs of ``quantized_decomposed`` quantize and dequantize ops where its kernels read and
        write integers, and int8 weights each followed by a dequantize op.

        Raises:
            ExportError: A kernel has no equivalent in such a graph.
            TraceError: The network cannot be captured as a graph.
        """
        from qat_lightning.export.program import float_program, int8_program

        if self.quantized is None:
            return float_program(self.network, self.example)
        return int8_program(self.quantized, self.example)


class Format(Protocol):
    """A file format and the runtime that runs it.

    Attributes:
        name: The name that users give.
        suffix: Suffix of the file, such as ``".onnx"``.
        runtime: Name of the runtime, such as ``"ONNX Runtime"``.
        extra: The optional dependency to install, as in ``pip install qat-lightning[extra]``.
        batch: The only batch size that its files support; None for any.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    runtime: ClassVar[str]
    extra: ClassVar[str | None]
    batch: ClassVar[int | None]

    def require(self) -> None:
        """Check that the required packages are installed.

        Raises:
            MissingExtraError: One is missing; the message has the command that installs it.
        """
        ...

    def refusal(self, recipe: Recipe) -> str:
        """Return why this format does not support a recipe, and what to choose instead; empty if it does."""
        ...

    def write(self, source: Source, path: Path) -> None:
        """Write the file, which does not exist yet; additional files are written beside it.

        Raises:
            ExportError: The format or its runtime does not support an op; the message names it.
        """
        ...

    def load(self, path: Path) -> Runner:
        """Load a file with its runtime, in a process without the network's code."""
        ...

    def ports(self, path: Path) -> tuple[Port, ...]:
        """Return the inputs and outputs of a file that are integers where the network has floats.

        Empty for most formats. The runner that `load` returns takes and returns floats, and converts them itself.
        """
        ...

    def kernels(self, path: Path) -> Kernels | None:
        """Return how layers of a file are run; None if the runtime does not report it, or runs all as written."""
        ...
