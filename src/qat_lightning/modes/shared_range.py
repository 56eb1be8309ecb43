"""One range for several tensors: rounding without observing, and observing without rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.numerics.fake_quantize import FakeQuantize


class SharedRange(nn.Module):
    """Rounds to the grid of a FakeQuantize elsewhere in the network, without updating its range.

    For ops whose output is on the grid of their input. Only one place may observe a range; a moving average would mix
    the ranges of several tensors.

    Args:
        fq: The FakeQuantize; not a child, since the network has it already.
    """

    def __init__(self, fq: FakeQuantize) -> None:
        super().__init__()
        self.__dict__["fq"] = fq

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, in its shape and dtype."""
        fq: FakeQuantize = self.__dict__["fq"]
        return fq.round(x)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load nothing: a checkpoint of an earlier release may have a separate range here."""


class UnionObserver(nn.Module):
    """Updates the range of a FakeQuantize elsewhere in the network with the union of several tensors.

    Args:
        fq: The FakeQuantize; not a child, since the network has it already.
    """

    def __init__(self, fq: FakeQuantize) -> None:
        super().__init__()
        self.__dict__["fq"] = fq

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> None:
        """Observe, if the FakeQuantize would."""
        fq: FakeQuantize = self.__dict__["fq"]
        if fq.observes:
            there = [tensor.detach().float().flatten() for tensor in tensors if tensor.numel()]
            if fq.ends_suffice:
                there = [torch.stack(torch.aminmax(values)) for values in there]
            if there:
                fq.observe(torch.cat(there))
