"""The device for tests in this folder. Int8 networks of pt2e are not compiled here; `tests/modes` does that."""

import pytest

from tests.callbacks.conftest import _no_compiler  # noqa: F401 (a fixture)


@pytest.fixture
def accelerator(request: pytest.FixtureRequest) -> str:
    """The name as a Trainer takes it."""
    return "gpu" if request.config.getoption("--device") == "cuda" else "cpu"
