"""Warnings of non-finite values, wherever a range is observed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.callbacks.parts.nonfinite import NonFiniteReport
from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe


class Joined(nn.Module):
    """A layer after two tensors that share a range and belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate and apply the layer."""
        return self.linear(torch.cat([x.sin(), x.cos()], 1))


@pytest.mark.parametrize("mode", ["fx", "eager", "pt2e"])
def test_a_range_that_several_tensors_share_is_warned_of_as_well(mode: str) -> None:
    prepared = get_mode(mode).prepare(Joined(), Example((torch.randn(3, 4),)), Recipe(mode, "x86"))
    prepared(torch.randn(3, 4))
    prepared(torch.full((3, 4), torch.nan))
    with pytest.warns(UserWarning, match="NaN or infinite activations in 1 batch"):
        NonFiniteReport().look({"net": prepared})
