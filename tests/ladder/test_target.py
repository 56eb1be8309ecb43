"""What has to be reached: which targets there are, and how near a network is."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qat_lightning import Target
from qat_lightning.errors import ConfigurationError


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({}, "give max_drop, min_speedup or max_size_mb"),
        ({"max_minutes": 10}, "give max_drop, min_speedup or max_size_mb"),
        ({"max_drop": -0.1}, "max_drop=-0.1 is not valid: give a number of 0 or more"),
        ({"min_speedup": 0}, "min_speedup=0 is not valid: give a number above 0"),
        ({"max_size_mb": -2}, "max_size_mb=-2 is not valid"),
        ({"max_drop": True}, "max_drop=True is not valid"),
        ({"max_drop": "0.3"}, "max_drop='0.3' is not valid"),
        ({"max_drop": math.nan}, "max_drop=nan is not valid"),
        ({"max_drop": 0.1, "max_minutes": 0}, "max_minutes=0 is not valid"),
        ({"max_drop": 0.1, "confident": 1}, "confident=1 is not valid: use True or False"),
        ({"max_size_mb": 2, "confident": True}, "give max_drop as well"),
    ],
)
def test_what_is_no_target_is_refused(limits: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Target(**limits)
    assert says in str(caught.value)


def test_a_size_that_two_bits_do_not_give_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="8,000,000 parameters take 2 MB with 2 bits each"):
        Target(max_size_mb=1.9).check_size(8_000_000)
    Target(max_size_mb=2.0).check_size(8_000_000)
    Target(max_drop=0.1).check_size(8_000_000)


def test_what_is_missed_is_a_share_of_the_limit() -> None:
    target = Target(max_drop=0.01, min_speedup=4, max_size_mb=2)
    assert target.missed(0.01, 4.0, 2.0) == {}
    assert target.missed(0.03, 3.0, 3.0) == {"size": 0.5, "speedup": 0.25, "drop": pytest.approx(2.0)}
    assert target.missed(None, math.nan, None) == {"size": math.inf, "speedup": math.inf, "drop": math.inf}
    assert Target(max_drop=0.0).missed(0.02, None, None) == {"drop": 0.02}
