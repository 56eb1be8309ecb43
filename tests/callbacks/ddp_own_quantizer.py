"""Program of `test_own_quantizer`: a fit and a test with a user's quantizer in two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.callbacks.ddp_run import digest
from tests.callbacks.lit import Lit, dataset, loader, qat, ranges, statistics, trainer
from tests.support.quantizers import OwnQuantizer


def main(folder: Path) -> None:
    """Write the final state of this process, for each form of ``backend=``."""
    found = {}
    forms = {"path": "tests.support.quantizers.wide_quantizer", "instance": OwnQuantizer(symmetric=True, bias=True)}
    for name, backend in forms.items():
        torch.manual_seed(0)
        module = Lit()
        callback = qat("pt2e", backend=backend, start={"step": 1}, freeze_observers={"step": 3})
        two = trainer(callback, strategy="ddp", devices=2, max_epochs=2, limit_train_batches=2)
        two.fit(module, loader(128, shuffle=True), loader())
        two.test(module, loader(), verbose=False)
        found[name] = {
            "ranges": digest(ranges(module)),
            "statistics": digest(statistics(module)),
            "weights": digest(dict(module.named_parameters())),
            "int8": callback.quantized(dataset()[:32][0]).tolist(),
            "fidelity": callback.fidelity,
        }
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
