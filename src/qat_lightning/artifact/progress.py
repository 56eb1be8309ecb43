"""State that is passed along while a file is written or read: tensors and requirements."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from qat_lightning.artifact.tensors import TensorReader, TensorWriter


@dataclass
class Writing:
    """Collected while a graph is encoded.

    Attributes:
        tensors: Its tensors.
        needs_network: Names and classes of modules whose code the file cannot store.
        needs_trust: Functions and methods that only a trusted file may call.
    """

    tensors: TensorWriter = field(default_factory=TensorWriter)
    needs_network: dict[str, str] = field(default_factory=dict)
    needs_trust: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """Provided for decoding a graph besides its own data.

    Attributes:
        tensors: Its tensors.
        network: The float network, for modules whose code the file cannot store.
        trusted: Whether functions that are not on the lists may be called.
    """

    tensors: TensorReader
    network: nn.Module | None = None
    trusted: bool = False
