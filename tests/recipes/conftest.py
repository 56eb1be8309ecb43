"""PT2E networks run their decomposed graph, because compiling takes seconds; `tests/modes` compiles."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_compiler() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_LIGHTNING_COMPILE", "0")
        yield
