"""What `test_seams` starts: fits and tests with two processes, and writes what each of them ends with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from tests.callbacks.lit import MODES, Lit, dataset, loader, qat, ranges, trainer
from tests.callbacks.test_insert import OwnForward


def digest(values: dict[str, Any]) -> str:
    return repr([(key, value.double().sum().item()) for key, value in values.items() if isinstance(value, Tensor)])


def run(mode: str, module: LightningModule) -> tuple[int, dict[str, Any]]:
    torch.manual_seed(0)
    callback = qat(mode, start={"step": 1}, freeze_observers={"step": 3})
    two = trainer(callback, strategy="ddp", devices=2, max_epochs=2, limit_train_batches=2)
    two.fit(module, loader(128, shuffle=True), loader())
    found: dict[str, Any] = {"steps": two.global_step, "ranges": digest(ranges(module))}
    found["weights"] = digest(module.state_dict())
    found["int8"] = callback.quantized(dataset()[:32][0]).sum().item()
    for variant in callback.variants:
        callback.use_variant(variant)
        two.test(module, loader(), verbose=False)
    found["variants"] = callback.variants
    found["fidelity"] = callback.fidelity
    callback.use_variant(None)
    two.validate(module, loader(), verbose=False)
    two.fit(module, loader(128), loader())
    found["again"] = digest(module.state_dict())
    return two.global_rank, found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {}
    for mode in MODES:
        for make in (Lit, OwnForward):
            rank, results[f"{mode} {make.__name__}"] = run(mode, make())
    (folder / f"{rank}.json").write_text(json.dumps(results))
