"""Re-estimated BatchNorm statistics are those of the pooled batches, in every mode and in real fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from qat_lightning import BatchNormReestimation, Distillation
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.recipes.batchnorm import reestimate_batchnorm
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import MODES, Lit, loader, qat, state, statistics, trainer
from tests.callbacks.test_insert import OwnForward
from tests.support.networks import CASES

CASE = {case.name: case for case in CASES}


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 99), offset=st.floats(-50, 50))
def test_statistics_are_those_of_the_pooled_batches(sizes: list[int], seed: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [offset + torch.randn(size, 3, 2, 2, generator=generator) for size in sizes]
    network = nn.Sequential(nn.BatchNorm2d(3))
    assert reestimate_batchnorm(network, batches) == len(sizes)
    pooled = torch.cat(batches).double().transpose(0, 1).flatten(1)
    found: Any = network[0]
    torch.testing.assert_close(found.running_mean.double(), pooled.mean(1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.running_var.double(), pooled.var(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "shared_layers"])
@pytest.mark.parametrize("mode", MODES)
def test_a_prepared_network_has_those_of_its_own_layers(mode: str, name: str) -> None:
    """The first BatchNorm gets the output of its rounded convolution; nothing else changes."""
    torch.manual_seed(0)
    case = CASE[name]
    network = case.network()
    args, kwargs, _ = case.batch(16)
    flow = get_mode(mode)
    prepared = flow.prepare(network, Example(args, kwargs), Recipe(mode, "x86"))
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    prepared.train()(*args, **kwargs)
    set_phase(prepared, fake_quant=True, observers=False, batchnorm_frozen=True)
    before = state(prepared)
    batches = [case.batch(8) for _ in range(3)]
    assert reestimate_batchnorm(prepared, [Example(args, kwargs) for args, kwargs, _ in batches]) == 3
    after = state(prepared)
    moved = {key for key, value in before.items() if isinstance(value, Tensor) and not torch.equal(value, after[key])}
    assert moved == {key for key in before if key.endswith(("running_mean", "running_var"))}
    assert all(module.training for module in prepared.modules())
    # Once more on the same batches: the statistics are the same up to the weights that are rounded with them.
    with torch.no_grad():
        assert all(value.isfinite().all() for value in statistics(prepared).values())


def test_pooled_over_two_places_of_one_batchnorm() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(x + 4)

    network = Twice()
    reestimate_batchnorm(network, [torch.tensor([[0.0], [2.0]])])
    assert network.norm.running_mean is not None
    assert network.norm.running_mean.item() == pytest.approx(3.0)


def test_no_batches_and_no_batchnorm() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2))
    before = state(network)
    assert reestimate_batchnorm(network, []) == 0
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    with pytest.raises(ConfigurationError, match="no BatchNorm with running statistics"):
        reestimate_batchnorm(nn.Linear(2, 2), [torch.randn(2, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("make", [Lit, OwnForward])
@pytest.mark.parametrize("mode", MODES)
def test_in_a_fit(mode: str, make: Any) -> None:
    """Weights and ranges end as without it; the statistics differ, and int8 has them."""
    ends, callbacks = [], []
    for others in ([], [BatchNormReestimation(batches=4)]):
        seed_everything(0, verbose=False)
        module, callback = make(), qat(mode)
        fitting = trainer(callback, *others)
        fitting.fit(module, loader(), loader())
        ends.append(state(module))
        callbacks.append(callback)
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        if isinstance(value, Tensor):
            assert torch.equal(value, ends[1][key]) != key.endswith(("running_mean", "running_var")), key
    (metrics,) = fitting.test(module, loader(), verbose=False)
    assert metrics["test/acc"] > 0.9
    assert callbacks[1].fidelity["agreement"] == 1.0


def test_after_distillation_and_before() -> None:
    for others in ([Distillation(), BatchNormReestimation(2)], [BatchNormReestimation(2), Distillation()]):
        trainer(qat("fx"), *others).fit(Lit(), loader(), loader())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="batches=0 is not valid"):
        BatchNormReestimation(batches=0)
    with pytest.raises(ConfigurationError, match="needs exactly one QuantizationAwareTraining"):
        trainer(BatchNormReestimation()).fit(Lit(), loader())
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(ConfigurationError, match="'net' holds no BatchNorm"):
        trainer(qat("fx"), BatchNormReestimation()).fit(Lit(plain), loader())
