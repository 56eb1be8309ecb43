"""Mixed precision that a forward turns on by itself, which no trace sees: the calls in it are traced as they are."""

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
    """Note within the block which regions of mixed precision are entered, as they are written."""
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
