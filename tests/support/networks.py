"""Small networks for tests of every mode, each with an example and a task that it can learn in a few steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4


class Plain(nn.Module):
    """Convolution, BatchNorm, ReLU, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """One ReLU module used twice, and the last BatchNorm weight initialized to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16, eps=1e-3, momentum=0.05)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, CLASSES)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)) + x)
        return self.head(self.pool(out).flatten(1))


class Depthwise(nn.Module):
    """Inverted residual: depthwise convolutions with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.depthwise(self.expand(x)))
        return self.head(x.mean((2, 3)))


class LinearOnly(nn.Module):
    """A perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Functional(nn.Module):
    """Functional ReLU, pooling, dropout, concatenation, multiplication and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 8, 1)
        self.join = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1)
        x = F.max_pool2d(F.relu(self.join(x)), 2)
        x = F.dropout(x, 0.1, self.training)
        return self.head(x.view(x.size(0), -1))


class SeveralInputs(nn.Module):
    """Two inputs, one by keyword, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 16, 3, padding=1)
        self.table = nn.Linear(5, 16)
        self.head = nn.Linear(16, CLASSES)
        self.side = nn.Linear(16, 2)

    def forward(self, x: Tensor, table: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = F.relu(self.image(x)).mean((2, 3)) + F.relu(self.table(table))
        return {"logits": self.head(hidden) * scale, "side": self.side(hidden)}


class SharedLayers(nn.Module):
    """A convolution called twice, with a BatchNorm after only one call, and a BatchNorm before its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.act = nn.ReLU()
        self.widen = nn.Conv2d(3, 16, 1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(self.act(self.first(x)))
        x = self.conv(x) + 0.5
        x = self.act(self.bn(self.conv(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Patches, positions, LayerNorm, attention whose scale comes from a shape, residual adds, GELU and dropout."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, dim, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.05)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        batch, tokens, dim = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        )
        weights = ((q @ k.transpose(-2, -1)) * (dim // self.heads) ** -0.5).softmax(-1)
        x = x + self.dropout(self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, dim)))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class ControlFlow(nn.Module):
    """Branches on brightness, which no graph can represent."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.bright = nn.Conv2d(16, 16, 3, padding=1)
        self.dark = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        hidden = self.bright(hidden) if float(x.detach().mean()) > 0 else self.dark(hidden)
        return self.head(F.relu(hidden).mean((2, 3)))


def _image(count: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    labels = torch.arange(count) % CLASSES
    images = torch.randn(count, 3, 8, 8) * 0.5
    # Each class is bright in a quarter of the image and tinted; learnt in a few steps.
    for label in range(CLASSES):
        rows, columns = divmod(label, 2)
        for channel in [label] if label < 3 else [0, 1, 2]:
            images[labels == label, channel, rows * 4 : rows * 4 + 4, columns * 4 : columns * 4 + 4] += 2.0
    return (images,), {}, labels


def _image_and_table(count: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    (images,), _, labels = _image(count)
    return (images,), {"table": F.one_hot(labels, 5).float() + 0.1 * torch.randn(count, 5)}, labels


@dataclass(frozen=True)
class Case:
    """A network of the table.

    Attributes:
        name: Name for tests.
        network: Creates it.
        batch: Creates a batch of a given size: positional inputs, keyword inputs, labels.
        modes: The modes that support it.
        layers: Minimum number of int8 layers.
    """

    name: str
    network: Callable[[], nn.Module]
    layers: int
    batch: Callable[[int], tuple[tuple[Any, ...], dict[str, Any], Tensor]] = _image
    modes: tuple[str, ...] = ("eager", "fx", "pt2e")

    def logits(self, output: Any) -> Tensor:
        """The tensor with the class axis."""
        logits: Tensor = output["logits"] if isinstance(output, dict) else output
        return logits


CASES = (
    Case("plain", Plain, 2),
    Case("residual", Residual, 4),
    Case("depthwise", Depthwise, 4),
    Case("linear", LinearOnly, 2),
    Case("functional", Functional, 4),
    Case("several_inputs", SeveralInputs, 4, batch=_image_and_table),
    Case("shared_layers", SharedLayers, 3),
    Case("attention", Attention, 5),
    Case("control_flow", ControlFlow, 3, modes=("eager",)),
)


def train(prepared: nn.Module, case: Case, steps: int = 25, lr: float = 0.02) -> None:
    """A short training on the case's task, in the current phase."""
    prepared.train()
    optimizer = torch.optim.Adam(prepared.parameters(), lr=lr)
    for _ in range(steps):
        args, kwargs, labels = case.batch(32)
        loss = F.cross_entropy(case.logits(prepared(*args, **kwargs)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
