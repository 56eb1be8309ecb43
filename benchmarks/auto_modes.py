"""The mode that ``mode="auto"`` chooses for several networks: ``python -m benchmarks.auto_modes [NAMES]``.

Four networks with typical Python code and random weights: a U-Net with transposed convolutions, a stack of gated
dilated one-dimensional convolutions (WaveNet, van den Oord et al., 2016), a detector whose number of boxes depends on
the scores, and a decoder that loops until a value of the sample ends it. Each is rehearsed in the modes that ``auto``
tries: prepared, calibrated, converted, verified, saved and loaded.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import describe
from qat_lightning.graph.example import Example
from qat_lightning.rehearsal.auto import decide
from qat_lightning.settings.recipe import Recipe


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Ronneberger et al., 2015: two levels of downsampling, then transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.low = _block(3, 16), _block(16, 32), _block(32, 64)
        self.up_two, self.up_one = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join_two, self.join_one, self.out = _block(64, 32), _block(32, 16), nn.Conv2d(16, 4, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores for each pixel."""
        one = self.one(x)
        two = self.two(self.pool(one))
        up = self.join_two(torch.cat([self.up_two(self.low(self.pool(two))), two], 1))
        scores: Tensor = self.out(self.join_one(torch.cat([self.up_one(up), one], 1)))
        return scores


class WaveNet(nn.Module):
    """Gated dilated causal convolutions with summed skip connections."""

    def __init__(self, channels: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, channels, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=2**n) for n in range(depth))
        self.skips = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(depth))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(channels, channels, 1), nn.ReLU(), nn.Conv1d(channels, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of the next value at each position."""
        x, total = self.first(x), torch.zeros(())
        for dilated, skip in zip(self.dilated, self.skips, strict=True):
            gates, values = dilated(nn.functional.pad(x, (dilated.dilation[0], 0))).chunk(2, 1)
            y = skip(torch.sigmoid(gates) * torch.tanh(values))
            x, total = x + y, total + y
        scores: Tensor = self.last(total)
        return scores


class Detector(nn.Module):
    """A backbone and a head, with a number of boxes that depends on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *(layer for n in range(3) for layer in (_block(3 if not n else 24, 24), nn.MaxPool2d(2)))
        )
        self.head = nn.Sequential(_block(24, 24), nn.Conv2d(24, 5, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return for each image the boxes with above-average scores."""
        found = self.head(self.backbone(x)).flatten(2).transpose(1, 2)
        return [boxes[boxes[:, 4] > boxes[:, 4].mean()] for boxes in found]


class Decoder(nn.Module):
    """Loops until a state is large enough, at most eight times."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
        self.step = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state."""
        state: Tensor = self.encoder(x)
        for _ in range(8):
            state = state + self.step(state)
            if float(state.abs().max()) > 8:
                break
        return state


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "U-Net": (UNet, (4, 3, 64, 64)),
    "WaveNet": (WaveNet, (4, 1, 256)),
    "detector": (Detector, (4, 3, 64, 64)),
    "decoder with a loop": (Decoder, (4, 32)),
}


def main() -> None:
    """Rehearse and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help=f"by default all of {', '.join(NETWORKS)}")
    names = parser.parse_args().names or list(NETWORKS)
    warnings.filterwarnings("ignore")
    table = Table("network", "auto takes", "MACs in int8", "rehearsals, s", "why")
    for name in names:
        torch.manual_seed(0)
        make, shape = NETWORKS[name]
        began = time.process_time()
        decision = decide("auto", make(), Example((torch.randn(shape),)), lambda mode: Recipe(mode, "x86"))
        share = "" if decision.rehearsal is None else f"{100 * decision.rehearsal.int8_macs:.1f} %"
        table.add_row(name, decision.mode, share, f"{time.process_time() - began:.0f}", decision.why.splitlines()[0])
    Console(width=150).print(table)
    print(describe())


if __name__ == "__main__":
    main()
