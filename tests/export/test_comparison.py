"""When an artifact's outputs differ too much from fake-quant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning.export.comparison import CHANCE, Comparison, Judgement, problem, too_few_equal
from qat_lightning.export.comparison import judge as judgement_of
from qat_lightning.graph.example import Example


class Returns(nn.Module):
    """Returns a function of the input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def judge(wanted: Any, got: Any, x: Tensor | None = None) -> str:
    """The fault found in an artifact that computes ``got`` instead of ``wanted``."""
    call, found = Example((torch.randn(8, 4) if x is None else x,)), Comparison()
    found.update(wanted(*call.args), got(*call.args))
    return problem(found, Returns(wanted), [call], min_sqnr_db=20.0, min_equal=0.995)


def test_a_wrong_output_is_seen_beside_a_larger_one_that_is_right() -> None:
    assert not judge(lambda x: (1000 * x, x), lambda x: (1000 * x, x + 1e-3))
    assert "[1]: 6.0 dB" in judge(lambda x: (1000 * x, x), lambda x: (1000 * x, 1.5 * x))


def test_whole_numbers_and_masks_are_compared_by_what_is_equal() -> None:
    assert "['count']: 0.0% of the integers" in judge(
        lambda x: {"count": (x > 0).sum(1)}, lambda x: {"count": (x > 0).sum(1) + 1}
    )
    assert not judge(lambda x: x > 0, lambda x: x > 0)


def test_what_jumps_at_a_small_change_may_be_as_far_as_it_is_from_itself() -> None:
    def jumps(x: Tensor) -> Tensor:
        return (1e5 * x).sin()

    def differently(x: Tensor) -> Tensor:
        return (1e5 * x + 2).sin()

    assert not judge(jumps, differently, torch.randn(64, 16))
    assert judge(lambda x: x.sin(), lambda x: (x + 2).sin(), torch.randn(64, 16))


def test_rows_that_are_found_may_differ_in_number_where_a_small_change_finds_others() -> None:
    x = torch.linspace(-1e-4, 1e-4, 64)[:, None].repeat(1, 4) + 1
    assert not judge(lambda x: x[x[:, 0] > 1.0], lambda x: x[x[:, 0] > 1.00005], x)
    assert "another shape" in judge(lambda x: x, lambda x: x[1:])


def test_masked_scores_and_outputs_without_rows_are_no_difference() -> None:
    def masked(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.masked_fill(x > 0, -torch.inf), x[:0]

    assert not judge(masked, masked)
    found = Comparison()
    found.update(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]))
    assert found.sqnr_db == {"": -math.inf}


@given(rows=st.integers(1, 3000), different=st.integers(0, 3000), least=st.sampled_from([0.9, 0.98, 0.995, 1.0]))
def test_equal_rows_are_too_few_where_chance_does_not_explain_it(rows: int, different: int, least: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    different = min(rows, different)
    below = 1 - different / rows < least
    likely = stats.binom.sf(different - 1, rows, 1 - least)
    if abs(likely - CHANCE) > 1e-9:
        assert too_few_equal(rows - different, rows, least) == (below and likely < CHANCE)


def test_many_rows_are_judged_at_once() -> None:
    assert too_few_equal(0, 10**9, 0.995)
    assert not too_few_equal(10**9, 10**9, 1.0)
    assert not too_few_equal(0, 0, 0.995)


def test_an_output_below_the_limit_asked_for_is_accepted_with_the_limit_that_was_used() -> None:
    call, found = Example((torch.randn(64, 16),)), Comparison()
    found.update(call.args[0], call.args[0] * (1 + 1e-4))

    def judged(least: float) -> Judgement:
        return judgement_of(found, nn.Identity(), [call], min_sqnr_db=least, min_equal=0.995)

    assert judged(20) == judged(79) == Judgement()
    remark = judged(200).remark
    assert "the output: 80.0 dB of SQNR, where at least 200.0 dB are required; accepted" in remark
    assert 40 < float(remark.partition("the limit used is ")[2].removesuffix(" dB")) < 60
