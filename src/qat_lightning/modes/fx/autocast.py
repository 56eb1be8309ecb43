"""Autocast regions inside a forward: tracing does not see them, so the calls within are traced without autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

NOT_SEEN = (
    "tracing does not capture it, so the graph would compute in float32 what the network computes in another "
    "precision. Remove the region, or set enabled=False in it, and use Trainer(precision='bf16-mixed') instead."
)


@contextlib.contextmanager
def noting_autocast() -> Iterator[set[str]]:
    """Record the autocast regions that are entered within the block, in the form of source code."""
    kind: Any = torch.amp.autocast_mode.autocast
    enter, found = kind.__enter__, set[str]()

    def noted(self: Any) -> Any:
        if self._enabled and self.fast_dtype != torch.float32:
            found.add(f"torch.autocast({self.device!r}, dtype={self.fast_dtype})")
        return enter(self)

    kind.__enter__ = noted
    try:
        yield found
    finally:
        kind.__enter__ = enter
