"""The largest submodules that mode fx takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.fx.mode import FxMode
from qat_lightning.modes.parts.finding import find_parts
from qat_lightning.settings.recipe import Recipe


class Detector(nn.Module):
    """A shared head on two sizes, behind which values decide, and a layer that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))
        self.same = self.head
        self.spare = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> list[Tensor]:
        large = self.body(images)
        scores = torch.cat([self.head(x).flatten(2) for x in (large, large[..., ::2, ::2])], 2)
        return [boxes[:, boxes[0] > 0] for boxes in scores if float(boxes.sum()) < 1e9]


def test_finds_the_largest_submodules_and_says_why_not_the_whole() -> None:
    network, recipe = Detector(), Recipe("fx", "x86")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = find_parts(
        network,
        Example((torch.randn(2, 3, 16, 16),)),
        lambda name, module, example: FxMode().prepare(module, example, recipe, prefix=name),
    )
    assert list(found.parts) == ["body", "head"]
    assert [tuple(call.args[0].shape) for call in found.parts["head"]] == [(2, 8, 16, 16), (2, 8, 8, 8)]
    assert list(found.refused) == [""]
    assert "cannot trace Detector" in found.refused[""]
    assert found.uncalled == ["spare"]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
