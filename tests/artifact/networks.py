"""Networks that are difficult to store in a file: float layers, constants, nested structures, custom modules."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Zoo(nn.Module):
    """Layers of many types in sequence."""

    def __init__(self, prelu: bool = True, recurrent: bool = True) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.activations = nn.Sequential(
            OrderedDict(
                prelu=nn.PReLU(8) if prelu else nn.Identity(),
                elu=nn.ELU(0.7),
                leaky=nn.LeakyReLU(0.2),
                hardswish=nn.Hardswish(),
                sigmoid=nn.Hardsigmoid(),
                tanh=nn.Hardtanh(-1.0, 2.0),
                gelu=nn.GELU("tanh"),
                softplus=nn.Softplus(2.0),
                threshold=nn.Threshold(0.1, 0.0),
            )
        )
        self.norms = nn.Sequential(nn.BatchNorm2d(8, eps=1e-3), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.transposed = nn.ConvTranspose2d(8, 8, 2, stride=2, output_padding=1)
        self.pools = nn.Sequential(
            nn.AvgPool2d(2), nn.MaxPool2d((2, 1)), nn.ZeroPad2d(1), nn.AdaptiveMaxPool2d((4, None))
        )
        self.flatten = nn.Flatten(2)
        self.norm = nn.LayerNorm([8], eps=1e-4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 6, batch_first=True)
        self.rnn = nn.RNN(6, 6, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms(self.activations(self.stem(x)))
        x = self.pools(self.transposed(self.up(x)))
        x = self.norm(self.flatten(x).transpose(1, 2))
        x, _ = self.attention(x, x, x, need_weights=False)
        if self.recurrent:
            x = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
        return self.head(x[:, -1, :6])


class Convolutions(nn.Module):
    """Convolutions with all settings, in one, two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv1d(3, 8, 5, stride=2, padding=2, dilation=1)
        self.norm = nn.BatchNorm1d(8)
        self.wide = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=2)
        self.deep = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.flat(x.flatten(2))))
        x = self.wide(x.unflatten(2, (4, -1)))
        x = F.relu(self.deep(x.unsqueeze(2)))
        return self.head(x.amax((2, 3, 4)))


class Point(NamedTuple):
    """A structure of a custom class."""

    logits: Tensor
    hidden: Tensor


class Structures(nn.Module):
    """Constants, slices, infinity, types, nested inputs and outputs, and a tensor used directly and by its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.randn(1, 8))
        self.register_buffer("table", torch.arange(8), persistent=False)
        self.conv = nn.Conv2d(3, 8, 3)
        self.embedding = nn.Embedding(8, 8, padding_idx=0)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor, extra: dict[str, Tensor]) -> dict[str, object]:
        hidden = F.relu(self.conv(x))[:, :, ::2, 1:-1].mean((-1, -2))
        hidden = self.head(hidden + extra["bias"]) + self.offset
        hidden = hidden + self.embedding(self.table).sum(0) * self.embedding.weight[1]
        clipped = torch.where(hidden > float("-inf"), hidden, torch.zeros_like(hidden, dtype=torch.float32))
        return {"point": Point(clipped, hidden), "pair": (hidden.to(torch.float64), [hidden.shape[1]])}


class OwnBlock(nn.Module):
    """Python code that cannot be part of a graph."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.register_buffer("seen", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if float(x.detach().sum()) > 0 else 1):
            x = torch.tanh(self.inner(x))
        return x


class WithOwnBlock(nn.Module):
    """A custom block, to be excluded as a whole."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.block = OwnBlock(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.conv(x).mean((2, 3))))


class FunctionalWeights(nn.Module):
    """Functional layers without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.linear = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.conv, None, (2, 1), (1, 1), (1, 1), 1))
        return F.linear(x.mean((2, 3)), self.linear, self.bias)


class Large(nn.Module):
    """More than 2 MB in float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 128, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(128)
        self.middle = nn.Conv2d(128, 256, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(256, 1000), nn.ReLU(), nn.Linear(1000, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(F.relu(self.bn(self.conv(x)))))
        return self.head(x.mean((2, 3)))
