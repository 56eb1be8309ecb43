"""No reference to a network remains in the process after preparation, conversion or rehearsal."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe
from tests.support.nightly import nightly_except

_CHANNELS = 613  # which no other network here has


def _weights() -> list[Tensor]:
    """The weights and copies of them, anywhere in the process."""
    shape = (_CHANNELS, 3, 3, 3)
    return [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and tuple(o.shape) == shape]


@pytest.mark.slow
@pytest.mark.parametrize("mode", nightly_except(["fx", "eager", "pt2e"], "fx"))
def test_no_weight_of_a_rehearsed_copy_stays(mode: str) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, _CHANNELS, 3), nn.BatchNorm2d(_CHANNELS), nn.ReLU(), nn.Conv2d(_CHANNELS, 4, 1)
    )
    gc.collect()
    before = len(_weights())
    rehearse(network, Example((torch.randn(2, 3, 6, 6),)), Recipe(mode, "x86"))
    gc.collect()
    assert len(_weights()) == before
