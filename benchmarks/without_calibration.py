"""Dynamic and weight-only networks compared with float: ``python -m benchmarks.without_calibration [--rounds 9]``.

Each network and batch size is measured in one process with one thread, with alternating variants. Reports median float
latency divided by that of the variant (above 1: faster), and file sizes.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import describe
from qat_lightning.artifact import artifact_size_mb
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.measure.metrics import latency_interleaved
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

FOUR_BITS = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=32)
VARIANTS = {
    "dynamic x86": ("x86", "dynamic", Scheme()),
    "dynamic fbgemm": ("fbgemm", "dynamic", Scheme()),
    "weight-only 8": ("x86", "weight_only", Scheme()),
    "weight-only 4": ("x86", "weight_only", FOUR_BITS),
}


class Recurrent(nn.Module):
    """One recurrent layer and a head."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, hidden: int) -> None:
        super().__init__()
        self.recurrent = kind(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences to scores."""
        scores: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return scores


class Encoder(nn.Module):
    """Two layers of torch's transformer encoder, and a head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, 8, 4 * dim, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences to scores."""
        scores: Tensor = self.head(self.encoder(x).mean(1))
        return scores


NETWORKS = {
    "LSTM 64 to 128, 8 steps": (Recurrent(nn.LSTM, 64, 128), (8, 64)),
    "LSTM 256 to 512, 32 steps": (Recurrent(nn.LSTM, 256, 512), (32, 256)),
    "GRU 256 to 512, 32 steps": (Recurrent(nn.GRU, 256, 512), (32, 256)),
    "encoder 256, 64 positions": (Encoder(256), (64, 256)),
    "encoder 512, 64 positions": (Encoder(512), (64, 512)),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="how often each variant is timed")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    speed, size = Table("network", "batch", *VARIANTS), Table("network", "float", *VARIANTS)
    for name, (network, shape) in NETWORKS.items():
        network.eval()
        for parameter in network.parameters():
            # torch's encoder copies its first layer, and a file stores equal weights only once
            nn.init.normal_(parameter, std=0.05)
        example = Example((torch.randn(4, *shape),))
        made: dict[str, nn.Module] = {"float": network}
        for variant, (backend, kind, scheme) in VARIANTS.items():
            recipe = Recipe("eager", backend, scheme, kind=kind)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[variant] = QuantizedNetwork(quantize(network, example, recipe), recipe, example)
        floats = sum(parameter.numel() * 4 for parameter in network.parameters()) / 1e6
        ratios = [f"{floats / artifact_size_mb(made[variant]):.1f} x" for variant in VARIANTS]  # type: ignore[arg-type]
        size.add_row(name, f"{floats:.2f} MB", *ratios)
        for batch in (1, 16):
            times = latency_interleaved(made, (torch.randn(batch, *shape),), rounds=rounds)
            wanted = times["float"].median_ms
            speed.add_row(name, str(batch), *(f"{wanted / times[variant].median_ms:.2f}" for variant in VARIANTS))
    console = Console(width=140)
    console.print(describe())
    console.print(speed, "faster than float by this factor")
    console.print(size, "smaller than float by this factor")


if __name__ == "__main__":
    main()
