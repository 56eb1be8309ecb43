"""A number that follows a cosine: its ends, its order, and invalid values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_lightning.errors import ConfigurationError
from qat_lightning.settings.curve import Cosine

numbers = st.floats(0, 100)


@given(numbers, numbers, st.floats(0, 1), st.floats(0, 1))
def test_it_goes_from_its_beginning_to_its_end_and_never_back(begin: float, end: float, a: float, b: float) -> None:
    curve = Cosine.parse([begin, end], name="freezing")
    assert curve is not None
    assert curve.at(0.0) == pytest.approx(begin, abs=1e-9)
    assert curve.at(1.0) == curve.at(7.0) == pytest.approx(end, abs=1e-9)
    early, late = curve.at(min(a, b)), curve.at(max(a, b))
    assert (late - early) * (end - begin) >= -1e-9
    assert min(begin, end) - 1e-9 <= early <= max(begin, end) + 1e-9


@pytest.mark.parametrize("value", [-0.1, "0.1", [0.1], [0.1, 0.2, 0.3], [0.1, None], True, float("nan"), 1.5])
def test_what_is_no_number_or_pair_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"freezing=.* is not valid: give a number from 0 to 1"):
        Cosine.parse(value, name="freezing", most=1.0)


def test_none_is_none() -> None:
    assert Cosine.parse(None, name="freezing") is None
