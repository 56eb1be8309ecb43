"""Typical networks, each with a feature that others do not have, and what a fit of it has to reach in every mode."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.settings.engines import onednn_is_exact

IMAGE, ROWS, TOKENS, SIGNAL = (4, 3, 16, 16), (8, 16), (4, 12, 16), (4, 8, 32)


def conv(a: int, b: int, k: int = 3, act: type[nn.Module] = nn.ReLU, **kw: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(b), act())


class Head(nn.Module):
    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return F.relu(self.c(self.b(x)) + x)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce, self.expand = conv(3, 8, act=nn.SiLU), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * gate.sigmoid()


class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, act=nn.ReLU6)
        self.block = nn.Sequential(
            conv(8, 24, 1, act=nn.ReLU6), conv(24, 24, groups=24, act=nn.ReLU6), nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.block(x)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        return torch.cat([x, y, self.c(torch.cat([x, y], 1))], 1)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.three = conv(3, 8), conv(8, 4, 1), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.one(x), self.three(x), F.max_pool2d(x, 3, 1, 1)], 1)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.low, self.up = conv(3, 8), conv(8, 8), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = F.interpolate(self.low(F.max_pool2d(skip, 2)), scale_factor=2.0, mode="nearest")
        return self.up(torch.cat([y, skip], 1))


class Pyramid(nn.Module):
    """Several outputs, from one head that is called at each level."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8, stride=2), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.a(x)
        return [self.head(x), self.head(self.b(x))]


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mask, self.label = conv(3, 8), nn.Conv2d(8, 1, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.a(x)
        return OrderedDict(mask=self.mask(x), label=self.label(x.mean((2, 3))))


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.tokens, self.channels = nn.LayerNorm(16), nn.Linear(12, 12), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.tokens(self.norm(x).transpose(1, 2))).transpose(1, 2)
        return x + F.gelu(self.channels(x))


class Attention(nn.Module):
    """Self-attention as in transformers, with sizes read from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.fc = (
            nn.LayerNorm(16),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(c // 2)).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, n, c))
        return self.fc(x.mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x).mean(1))


class PatchesWithClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.fc(x[:, 0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lstm, self.fc = nn.Linear(16, 16), nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(torch.relu(self.inner(x)))[0][:, -1])


class Gated(nn.Module):
    """A gate, and a split in two."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(a * b.sigmoid())


class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters, self.gates, self.out = (
            nn.Conv1d(8, 8, 3, padding=2, dilation=2),
            nn.Conv1d(8, 8, 1),
            nn.Conv1d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.filters(x)) + torch.tanh(self.gates(x)))


class DropoutPermuteAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.o, self.d = nn.Conv1d(8, 16, 3, padding=1), nn.Linear(16, 4), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.d(self.c(x)).permute(2, 0, 1) + x.mean(1, keepdim=True).permute(2, 0, 1))


class TiedTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(16, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.c(F.relu(self.a(x)))), self.c.weight.t())


class NormalizesByBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Conv2d(8, 3, 1)
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x - self.mean)) + self.mean


class NormAct(nn.BatchNorm2d):
    """A BatchNorm that is called directly, with its activation."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return F.relu(x)


class IntegerMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[:, :1] > 0).long()
        return self.b(self.a(x) * mask.float())


class SpatialSoftArgmax(nn.Module):
    """Ends with a function of an activation's values, divided by their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 8), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).flatten(2).softmax(-1)
        return y @ torch.linspace(0, 1, y.shape[-1], device=y.device).unsqueeze(-1)


class Loops(nn.Module):
    """Branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if float(x.mean()) > 1e6:
            x = x * 2
        return self.b(x)


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3, 4)))


class Normalized(nn.Module):
    """Unit vectors, BatchNorm of vectors and a difference between two int8 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(F.normalize(F.gelu(self.norm(y)) - y, dim=-1))


class Stochastic(nn.Module):
    """Drops whole branches in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = conv(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + self.drop(self.b(x))


@dataclass(frozen=True)
class Varied:
    """One network, and what a fit of it has to reach.

    Attributes:
        name: Name for tests.
        make: Creates it.
        shape: Shape of its input, with the batch.
        least: Minimum share of multiply-accumulates in int8, by mode; other modes refuse it before the first step,
            with a remedy.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    least: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("eager", "fx", "pt2e"), 0.99))


def _stack(make: Callable[[], list[nn.Module]]) -> Callable[[], nn.Module]:
    """A function that creates an ``nn.Sequential`` of new layers."""
    return lambda: nn.Sequential(*make())


def _all(share: float = 0.99, **others: float) -> dict[str, float]:
    return {**dict.fromkeys(("eager", "fx", "pt2e"), share), **others}


VARIED = (
    Varied("residual", Residual, IMAGE),
    Varied("squeeze and excite", SqueezeExcite, IMAGE),
    Varied("inverted residual with ReLU6", InvertedResidual, IMAGE),
    Varied("concatenations of concatenations", Dense, IMAGE),
    Varied("branches with a pool", Branches, IMAGE),
    Varied("U-Net", UNet, IMAGE),
    Varied("pyramid with a shared head", Pyramid, IMAGE),
    Varied("dict output", DictOutput, IMAGE),
    Varied("ConvNeXt block", ConvNeXt, IMAGE),
    Varied("classifier with pooling", lambda: Head(Residual(), 8), IMAGE),
    Varied("mixer", Mixer, TOKENS),
    Varied("attention by hand", Attention, TOKENS, _all(0.7)),
    Varied("transformer encoder", Encoder, TOKENS, _all(0.02, fx=0.002)),
    Varied("patches with a class token", PatchesWithClassToken, IMAGE),
    Varied("LSTM between linear layers", Recurrent, TOKENS, _all(0.2)),
    Varied("gated linear unit", Gated, ROWS),
    Varied("dilated convolutions with tanh gates", WaveNet, SIGNAL, _all(pt2e=0.3)),
    # torchao's quantizer for x86 has no rule for 1-d convolutions
    Varied("dropout, permute and add", DropoutPermuteAdd, SIGNAL, _all(0.99, pt2e=0.1)),
    Varied("weight used again, transposed", TiedTransposed, ROWS, _all(0.6, eager=0.5)),
    Varied("a buffer called mean", NormalizesByBuffer, IMAGE),
    Varied(
        "BatchNorm with its activation", _stack(lambda: [nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 4, 1)]), IMAGE
    ),
    Varied(
        "BatchNorm without affine",
        _stack(lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 4, 1)]),
        IMAGE,
    ),
    Varied(
        "BatchNorm with a weight of 0",
        lambda: zero_gamma(nn.Sequential(conv(3, 8), conv(8, 8), nn.Conv2d(8, 4, 1))),
        IMAGE,
    ),
    Varied("integer mask", IntegerMask, ROWS),
    Varied("soft argmax", SpatialSoftArgmax, IMAGE, _all(0.7)),
    Varied("a branch that depends on values", Loops, ROWS, {"eager": 0.99}),
    # QNNPACK, which runs where oneDNN overflows, has no weights of 3-d convolutions to save
    Varied("3-d convolution", Video, (2, 3, 4, 8, 8), _all(0.9 if onednn_is_exact() else 0.0, pt2e=0.0)),
    Varied("unit vectors and differences", Normalized, ROWS),
    Varied("dropped branches", Stochastic, IMAGE),
    Varied(
        "group norm and GELU",
        _stack(lambda: [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 4, 1)]),
        IMAGE,
    ),
    Varied(
        "hard swish and hard sigmoid",
        _stack(lambda: [conv(3, 8, act=nn.Hardswish), nn.Conv2d(8, 4, 1), nn.Hardsigmoid()]),
        IMAGE,
    ),
    Varied(
        "reflected padding",
        _stack(lambda: [nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 8, 3)]),
        IMAGE,
        _all(0.6),
    ),
    Varied(
        "transposed convolution",
        _stack(lambda: [conv(3, 8), nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 3)]),
        IMAGE,
    ),
    Varied(
        "leaky ReLU and PReLU",
        _stack(lambda: [conv(3, 8, act=nn.LeakyReLU), nn.Conv2d(8, 8, 1), nn.PReLU(), nn.Conv2d(8, 4, 1)]),
        IMAGE,
    ),
)


def zero_gamma(network: nn.Sequential) -> nn.Sequential:
    """Initialized such that residual blocks begin as identities."""
    nn.init.zeros_(network[1][1].weight)
    return network
