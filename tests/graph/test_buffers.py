"""Runs that leave the buffers of a network as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.buffers import buffers_copied


class Writes(nn.Module):
    """Writes to a buffer, replaces another one, and reads a view of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(4))
        self.register_buffer("start", self.table[:2])
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("none", None)

    def forward(self) -> tuple[Tensor, Tensor]:
        self.table.add_(1)
        self.replaced = self.replaced + 1
        return self.table, self.start


def test_buffers_are_the_same_tensors_with_the_same_values_afterwards() -> None:
    network = Writes()
    before = dict(network._buffers)
    network.register_forward_hook(lambda *_: {}["an error"])
    with pytest.raises(KeyError), buffers_copied(network):
        network()
    assert all(network._buffers[name] is buffer for name, buffer in before.items())
    assert network.table.sum() == network.replaced == 0


def test_results_keep_their_values_also_if_they_are_buffers_that_share_memory() -> None:
    network = nn.Sequential(Writes())
    with buffers_copied(network, network):
        table, start = network[0]()
    assert table.tolist() == [1.0] * 4
    assert start.tolist() == [1.0] * 2
    assert not network[0].table.any()
