import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_lightning.compare.spread import spread

values = st.floats(-1e6, 1e6)


@given(st.dictionaries(st.integers(), values, min_size=2))
def test_it_is_the_mean_and_the_sample_deviation_over_seeds(by_seed):
    found = spread(by_seed.items())
    assert found.mean == pytest.approx(statistics.fmean(by_seed.values()))
    assert found.deviation == pytest.approx(statistics.stdev(by_seed.values()))
    assert found.seeds == len(by_seed)


@given(st.dictionaries(st.integers(), values, min_size=1), st.integers(2, 4))
def test_repeating_every_run_of_a_seed_changes_nothing(by_seed, times):
    once, again = spread(by_seed.items()), spread(list(by_seed.items()) * times)
    assert again.seeds == once.seeds
    assert again.mean == pytest.approx(once.mean, rel=1e-9, abs=1e-6)
    if len(by_seed) > 1:
        assert again.deviation == pytest.approx(once.deviation, rel=1e-6, abs=1e-6)


@given(values)
def test_a_single_seed_has_no_spread(value):
    assert spread([("0", value)]) == (value, None, 1)


def test_without_a_run_there_is_nothing():
    assert spread([]) is None
