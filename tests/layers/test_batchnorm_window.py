"""BatchNorm's statistics of recent batches, computed from two snapshots of a running average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.layers.batchnorm_window import Difference, differs, measuring, settle, snapshot, window_length
from qat_lightning.layers.qat_modules import make_batchnorm_freezable


def network(**settings: object) -> nn.Module:
    """One BatchNorm, in training mode."""
    made = nn.Sequential(nn.BatchNorm1d(3, **settings))  # type: ignore[arg-type]
    make_batchnorm_freezable(made)
    return made


def batch(seed: int, scale: float = 0.01, shift: float = 3.0) -> Tensor:
    return shift + scale * torch.randn(64, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_the_statistics_are_those_of_the_batches_since(momentum: float | None) -> None:
    """With other batches before, whose share of the average is removed."""
    made = network(momentum=momentum)
    for seed in range(5):
        made(batch(seed, scale=1.0, shift=-3.0))
    then = snapshot(made)
    recent = [batch(seed) for seed in range(5, 25)]
    for values in recent:
        made(values)
    (changed,) = settle(made, then)
    assert changed.deviations > 0.5
    torch.testing.assert_close(made[0].running_mean, torch.cat(recent).mean(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(made[0].running_var, torch.cat(recent).var(0), rtol=0.2, atol=0)
    assert made[0].num_batches_tracked == 25


def test_statistics_that_have_settled_stay_as_they_are() -> None:
    made = network()
    for seed in range(60):
        made(batch(seed, scale=1.0))
    then = snapshot(made)
    for seed in range(60, 72):
        made(batch(seed, scale=1.0))
    before = snapshot(made)
    assert settle(made, then) == []
    assert all(torch.equal(a, b) for a, b in zip(before["0"], snapshot(made)["0"], strict=True))


def test_a_network_that_has_not_run_since_stays_as_it_is() -> None:
    made = network()
    assert settle(made, snapshot(made)) == []
    assert settle(made, {}) == []


@pytest.mark.parametrize(
    ("momenta", "length"), [([0.1], 10), ([0.5], 8), ([0.1, 0.03], 34), ([0.001], 64), ([None], 64)]
)
def test_the_window_is_as_long_as_the_average_remembers(momenta: list[float | None], length: int) -> None:
    made = nn.Sequential(*(nn.BatchNorm1d(3, momentum=momentum) for momentum in momenta))
    make_batchnorm_freezable(made)
    assert window_length(made) == length


def test_a_batch_tells_statistics_that_are_others() -> None:
    made = network()
    for seed in range(60):
        made(batch(seed, scale=1.0))
    made[0].frozen = True
    verdicts = []
    for values in (batch(60, scale=1.0), batch(61, scale=1.0, shift=4.0), batch(62, scale=3.0)):
        found: dict[str, Difference] = {}
        with measuring(made, found):
            made(values)
            made(values * 100)  # only the first call counts
        assert found["0"].samples == 64
        verdicts.append(differs(found["0"]))
    assert verdicts == [False, True, True]
    assert not made[0]._forward_pre_hooks
