"""PT2E networks run their decomposed graph, because compiling takes seconds; `tests/modes` compiles."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_compiler(without_compiler: None) -> None:
    """Every test of this folder."""
