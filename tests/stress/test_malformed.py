"""Every invalid input raises one of our errors that names it, and leaves the LightningModule unchanged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.stress import malformed
from tests.stress.malformed import FAMILIES, Files, Malformed, complaint

QUICK = {malformed.settings, malformed.schemes, malformed.pairs, malformed.variants, malformed.saved_files}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.ERROR)
    yield Files(tmp_path_factory.mktemp("files"))
    log.setLevel(before)


def _check(family: Any, files: Files, examples: int) -> None:
    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(family())
    def check(case: Malformed) -> None:
        found = complaint(case, files)
        assert not found, f"{case.what}: {found}"

    check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", dict.fromkeys(FAMILIES), ids=lambda family: family.__name__)
def test_ends_in_an_error_that_names_it(family: Any, files: Files) -> None:
    _check(family, files, 100 if family in QUICK else 12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_more_of_all_kinds(files: Files) -> None:
    _check(lambda: malformed.malformed, files, 300)


@given(st.data())
@settings(max_examples=20, database=None)
def test_what_is_right_is_not_complained_of_twice(data: st.DataObject) -> None:
    """The test of the check itself: a missing error is a complaint."""
    case = Malformed("none", "nothing wrong", ("x",), lambda _: data, None)
    assert complaint(case, Files(Path())) == "no error"
