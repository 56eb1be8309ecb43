"""What the formats have in common: one small protocol between them and what writes, loads, compares and times them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.export import ExportedProgram

from qat_lightning.flows.base import Example
from qat_lightning.quantized import QuantizedNetwork
from qat_lightning.recipe import Recipe

Runner = Callable[[list[Tensor]], list[Tensor]]
"""A loaded artifact: flat input tensors in, flat output tensors out, both in the order of the program's signature."""


@dataclass(frozen=True)
class Source:
    """What is exported: an int8 network, or the float one that it is compared with in the same runtime.

    Attributes:
        program: The network as one graph of aten ops with a dynamic batch; an int8 network has pairs of
            ``quantized_decomposed`` quantize and dequantize ops where its kernels read and write integers, and int8
            weights behind a dequantize op each.
        example: One real call.
        quantized: The int8 network; None for the float one.
    """

    program: ExportedProgram
    example: Example
    quantized: QuantizedNetwork | None = None


class Format(Protocol):
    """One file format and the runtime that runs it.

    Attributes:
        name: What the user types.
        suffix: Of the file, such as ``".onnx"``.
        runtime: The runtime in words, such as ``"ONNX Runtime"``.
        extra: The optional dependency it needs, as ``pip install qat-lightning[extra]`` names it.
    """

    name: str
    suffix: str
    runtime: str
    extra: str | None

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
        """Write the file, which does not exist yet.

        Raises:
            ExportError: The format or its runtime has no such op; the message names it.
        """
        ...

    def load(self, path: Path) -> Runner:
        """Load a file with the runtime itself, in a process that may know nothing of the network."""
        ...
