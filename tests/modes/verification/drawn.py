"""Small random networks: random blocks on images, with one to three outputs of different kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

CHANNELS = 6
BLOCKS = (
    *("conv", "conv1x1", "depthwise", "conv_bn_relu", "conv_relu6", "linear", "relu", "gelu", "hardtanh"),
    *("dropout", "pool", "add", "double", "mul", "cat", "permute_add", "layer_norm", "sigmoid", "normalize", "center"),
)
OUTPUTS = ("map", "row", "scalar", "empty", "index", "both")


@dataclass(frozen=True)
class Drawn:
    """The blocks of a network."""

    seed: int
    batch: int
    gain: float
    blocks: tuple[str, ...]
    outputs: tuple[str, ...]


def networks() -> st.SearchStrategy[Drawn]:
    return st.builds(
        Drawn,
        seed=st.integers(0, 10_000),
        batch=st.integers(1, 3),
        gain=st.sampled_from([1e-3, 1.0, 1.0, 30.0]),
        blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6).map(tuple),
        outputs=st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=3).map(lambda kinds: ("map", *kinds[1:])),
    )


def _layers(kind: str) -> nn.Module:
    c = CHANNELS
    made: dict[str, Any] = {
        "conv": lambda: nn.Conv2d(c, c, 3, padding=1),
        "conv1x1": lambda: nn.Conv2d(c, c, 1, bias=False),
        "depthwise": lambda: nn.Conv2d(c, c, 3, padding=1, groups=c),
        "conv_bn_relu": lambda: nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()),
        "conv_relu6": lambda: nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU6(inplace=True)),
        "linear": lambda: nn.Linear(4, 4),
        "dropout": lambda: nn.Dropout(0.1),
        "pool": lambda: nn.MaxPool2d(3, 1, 1),
        "hardtanh": lambda: nn.Hardtanh(0.0, 0.7),
        "add": lambda: nn.Conv2d(c, c, 1),
        "mul": lambda: nn.Conv2d(c, c, 1),
        "cat": lambda: nn.Conv2d(2 * c, c, 1),
        "permute_add": lambda: nn.Sequential(nn.Conv2d(c, c, 1), nn.Dropout(0.0)),
        "layer_norm": lambda: nn.LayerNorm(4),
    }
    return made.get(kind, nn.Identity)()


class DrawnNetwork(nn.Module):
    """Runs the blocks."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn = drawn
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(_layers(kind) for kind in drawn.blocks)
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for kind, block in zip(self.drawn.blocks, self.blocks, strict=True):
            x = _apply(kind, block, x)
        row = self.head(x.mean((2, 3)))
        found = {"map": x, "row": row, "scalar": row.sum(), "empty": row[:, :0], "index": row.argmax(1)}
        found["both"] = {"row": row, "short": x.flatten(1)[:, :2]}
        return tuple(found[kind] for kind in self.drawn.outputs)


def _apply(kind: str, block: nn.Module, x: Tensor) -> Tensor:
    if kind == "add":
        return x + block(x)
    if kind == "double":
        return x + x
    if kind == "mul":
        return x * block(x)
    if kind == "cat":
        return block(torch.cat([x, F.relu(x)], 1))
    if kind == "permute_add":
        return (block(x).permute(0, 2, 3, 1) + x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    functions: dict[str, Any] = {
        "relu": F.relu,
        "gelu": F.gelu,
        "sigmoid": torch.sigmoid,
        "normalize": lambda x: F.normalize(x, dim=1),
        "center": lambda x: x - x.mean((2, 3), keepdim=True),
    }
    result: Tensor = functions[kind](x) if kind in functions else block(x)
    return result
