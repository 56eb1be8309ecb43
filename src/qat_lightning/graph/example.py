"""One real call of a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One real call of the network: what it is traced, prepared and verified with.

    Attributes:
        args: Positional inputs, tensors on the CPU with a batch dimension of 2 or more.
        kwargs: Keyword inputs.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
