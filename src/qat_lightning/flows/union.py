"""One range for several tensors, as the inputs of a concatenation have it in the graph modes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat_lightning.fake_quantize import FakeQuantize


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
            if fq.histogram is None:
                there = [torch.stack(torch.aminmax(values)) for values in there]
            if there:
                fq.observe(torch.cat(there))
