"""One range for several tensors: what rounds to it without observing, and what observes it without rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.numerics.fake_quantize import FakeQuantize


class SharedRange(nn.Module):
    """Rounds to the grid of a FakeQuantize elsewhere in the network, without moving its range.

    For ops whose output has the grid of their input: only one place may observe a range, or a moving average would mix
    the ranges of several tensors.

    Args:
        fq: Whose grid; not a child, since it is one of the network already.
    """

    def __init__(self, fq: FakeQuantize) -> None:
        super().__init__()
        self.__dict__["fq"] = fq

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, in its shape and dtype."""
        fq: FakeQuantize = self.__dict__["fq"]
        return fq.round(x)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load nothing, whatever there is: a checkpoint of an earlier release may have a range of its own here."""


class UnionObserver(nn.Module):
    """Moves the range of a FakeQuantize that is elsewhere by the union of the ranges of several tensors.

    Args:
        fq: Not a child: it is registered, moved and saved where it is.
    """

    def __init__(self, fq: FakeQuantize) -> None:
        super().__init__()
        self.__dict__["fq"] = fq

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> None:
        """Observe, where the FakeQuantize would."""
        fq: FakeQuantize = self.__dict__["fq"]
        if fq.observes:
            there = [tensor.detach().float().flatten() for tensor in tensors if tensor.numel()]
            if fq.ends_suffice:
                there = [torch.stack(torch.aminmax(values)) for values in there]
            if there:
                fq.observe(torch.cat(there))
