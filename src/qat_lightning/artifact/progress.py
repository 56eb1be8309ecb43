"""What goes along while a file is written or read: its tensors, and what it needs besides."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from qat_lightning.artifact.tensors import TensorReader, TensorWriter


@dataclass
class Writing:
    """What is collected while a graph is written.

    Attributes:
        tensors: Its tensors.
        needs_network: Names of modules whose code the file cannot hold, and their classes.
        needs_trust: Functions and methods that only a trusted file may call.
    """

    tensors: TensorWriter = field(default_factory=TensorWriter)
    needs_network: dict[str, str] = field(default_factory=dict)
    needs_trust: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """What a graph is rebuilt from besides its own data.

    Attributes:
        tensors: Its tensors.
        network: The float network, for the modules whose code the file cannot hold.
        trusted: Whether functions that are not listed may be called.
    """

    tensors: TensorReader
    network: nn.Module | None = None
    trusted: bool = False
