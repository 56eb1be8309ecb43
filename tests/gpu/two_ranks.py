"""Program of `test_training_on_the_device`: a fit in two processes, and the final state of each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.callbacks.ddp_run import IMAGES, digest
from tests.callbacks.lit import MODES, Lit, loader, qat, trainer


def run(mode: str, accelerator: str) -> dict[str, Any]:
    """Weights, ranges and statistics after a fit, and the outputs of the int8 network."""
    torch.manual_seed(0)
    module, callback = Lit(), qat(mode, start={"step": 1}, freeze_observers={"step": 3}, freeze_batchnorm={"step": 3})
    two = trainer(callback, accelerator=accelerator, strategy="ddp", devices=2, sync_batchnorm=True)
    two.fit(module, loader(128))
    found = {"steps": two.global_step, "weights": digest({k: v.cpu() for k, v in module.state_dict().items()})}
    found["communication"] = torch.distributed.get_backend()
    found["acc"] = two.test(module, loader(), verbose=False)[0]["test/acc"]
    return found | {"int8": callback.quantized(IMAGES).sum().item()}


if __name__ == "__main__":
    results = {mode: run(mode, sys.argv[2]) for mode in MODES}
    Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
