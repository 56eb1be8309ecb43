"""Networks with lazy modules, whose parameters exist after a first call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import PostTrainingQuantization
from tests.callbacks.lit import CLASSES, MODES, Lit, dataset, loader, qat, trainer


def lazy() -> nn.Sequential:
    return nn.Sequential(
        nn.LazyConv2d(8, 3, stride=2), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)
    )


class WithLazyHead(Lit):
    """A lazy module outside of the quantized network is called first."""

    def __init__(self) -> None:
        super().__init__(lazy())
        self.scale = nn.LazyBatchNorm2d()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.scale(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", [False, True])
def test_lazy_modules_train_and_become_int8(mode: str, given: bool) -> None:
    torch.manual_seed(0)
    module, callback = Lit(lazy()), qat(mode, **({"example_inputs": dataset()[:4][0]} if given else {}))
    run = trainer(callback, max_epochs=4)
    run.fit(module, loader(), loader())
    assert run.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9
    assert sum(row.quantized for row in callback.quantized.coverage) == 2
    assert {p for group in run.optimizers[0].param_groups for p in group["params"]} == set(module.parameters())


@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
def test_lazy_modules_are_quantized_after_training(kind: Any) -> None:
    module, callback = Lit(lazy()), PostTrainingQuantization(kind=kind)
    run = trainer(callback)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert callback.quantized is not None


@pytest.mark.parametrize("callbacks", [lambda: qat(module="net"), lambda: PostTrainingQuantization(module="net")])
def test_statistics_of_lazy_modules_are_of_the_training_alone(callbacks: Any) -> None:
    """One that a trial step called, too."""
    module = WithLazyHead()
    run = trainer(callbacks(), max_epochs=1)
    run.fit(module, loader())
    assert int(module.scale.num_batches_tracked) == run.num_training_batches == run.global_step
    alone = nn.BatchNorm2d(1)
    for batch in loader():
        alone(batch[0])
    assert torch.equal(module.scale.running_mean, alone.running_mean)
    assert not module.scale._forward_pre_hooks
