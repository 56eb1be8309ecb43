"""The device that the tests of this folder run on. int8 networks of pt2e are not compiled: `tests/modes` does that."""

import pytest

from tests.callbacks.conftest import _no_compiler  # noqa: F401 (a fixture)


@pytest.fixture
def accelerator(request: pytest.FixtureRequest) -> str:
    """As a Trainer takes it."""
    return "gpu" if request.config.getoption("--device") == "cuda" else "cpu"
