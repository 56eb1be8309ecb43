"""Program of `test_export`: a fit in two processes with an export, and a test of the variants."""

import sys

import torch
from torch import Tensor

from qat_lightning import QuantizationAwareTraining, QuantizedModelExport, evaluate_variants
from tests.callbacks.lit import Lit, loader, trainer


class Waits(Lit):
    """A step with a barrier between the processes."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(torch.ones(1))
        return super().training_step(batch, batch_idx)


if __name__ == "__main__":
    export = QuantizedModelExport(["torchscript"], dirpath=sys.argv[1], batches=2)
    two = trainer(export, QuantizationAwareTraining("fx", "x86"), strategy="ddp", devices=2, max_epochs=1)
    model = Waits()
    two.fit(model, loader(), loader())
    summary = evaluate_variants(two, model, dataloaders=loader())
    passed = [result.passed for result in export.results.values()]
    sys.stdout.write(f"rank {two.global_rank} {passed} {'int8/test/acc' in summary}\n")
