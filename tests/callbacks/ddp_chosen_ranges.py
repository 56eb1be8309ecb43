"""Program of `test_chosen_ranges`: fits in two processes with ranges chosen from each batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from qat_lightning import Scheme
from qat_lightning.numerics.fake_quantize import FakeQuantize
from tests.callbacks.ddp_run import digest
from tests.callbacks.lit import MODES, Lit, dataset, loader, qat, ranges, trainer

BATCH = torch.randn(4000, generator=torch.Generator().manual_seed(3)) * 2
BATCH[0] = 50


def observer(source: Any) -> FakeQuantize:
    """The range of one tensor."""
    grid: dict[str, Any] = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 15, "qscheme": torch.per_tensor_affine}
    return FakeQuantize(**grid, source=source, percentile=99.0)


def halves(source: Any) -> list[list[float]]:
    """The range after both processes have seen a half, after the second has seen nothing, and after NaN in both."""
    rank, fq = torch.distributed.get_rank(), observer(source)
    fq.reduce_across_processes = True
    found = []
    for batch in (BATCH.chunk(2)[rank], torch.ones(1 - rank), torch.full((3,), torch.nan)):
        fq(batch)
        found.append([float(value) for value in (*fq.range(), fq.batches)])
    return found


def main(folder: Path) -> None:
    """Write the final state of this process."""
    found: dict[str, Any] = {}
    for mode in MODES:
        for name in ("histogram_mse", "percentile"):
            torch.manual_seed(0)
            module, scheme = Lit(), Scheme(activation_observer=name, activation_percentile=99.0)
            callback = qat(mode, scheme=scheme, start={"step": 1}, freeze_observers={"step": 3})
            two = trainer(callback, strategy="ddp", devices=2, max_epochs=2, limit_train_batches=2)
            two.fit(module, loader(128, shuffle=True), loader())
            found[f"{mode} {name}"] = {
                "ranges": digest(ranges(module)),
                "weights": digest(dict(module.named_parameters())),
                "int8": callback.quantized(dataset()[:32][0]).tolist(),
            }
    found["halves"] = {source: halves(source) for source in ("batch_mse", "batch_percentile")}
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
