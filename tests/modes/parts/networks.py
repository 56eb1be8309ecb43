"""Networks that cannot be captured as a whole, because they branch or loop on values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Detector(nn.Module):
    """A shared head for two sizes; losses in training, and non-overlapping boxes in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))
        self.same = self.head
        self.spare = nn.Linear(4, 4)

    def forward(self, images: Tensor, wanted: Tensor | None = None) -> Tensor | list[Tensor]:
        large = self.body(images)
        rows = torch.cat([head(x).flatten(2) for head, x in ((self.head, large), (self.same, large[..., ::2, ::2]))], 2)
        if self.training and wanted is not None:
            return F.mse_loss(rows.mean((1, 2)), wanted)
        return [suppressed(row) for row in rows]


def suppressed(row: Tensor) -> Tensor:
    """The best boxes (first, second, …, score) without a better one near them."""
    kept: list[int] = []
    for index in row[0].argsort(descending=True)[:8].tolist():
        if all(float((row[1:, index] - row[1:, other]).abs().sum()) > 1e-3 for other in kept):
            kept.append(index)
    return row[:, kept]


class Decoder(nn.Module):
    """A cell that is called until its output says stop, after an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.cell = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.start = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.encoder(x)
        state, steps = self.start.expand_as(memory), []
        while len(steps) < 3 or (len(steps) < 5 and float(state.detach().abs().mean()) > 1e3):
            state = self.cell(torch.cat([memory, state], -1))
            steps.append(state)
        return torch.stack(steps, 1)
