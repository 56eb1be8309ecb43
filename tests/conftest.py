"""Settings for all tests."""

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Tiny networks gain nothing from threads, which on a busy machine wait for each other; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# wandb reads its mode once a process: whichever test comes first, no run goes online. Subprocesses inherit it.
os.environ["WANDB_MODE"] = "offline"
# Processes that compile side by side keep what they compile apart.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
    Path(tempfile.gettempdir(), f"qat_lightning_inductor_{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}")
)

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import settings

from qat_lightning.settings.backends import BACKENDS
from tests.support.targets import missing

# a busy machine is no failure; and CI tries the same examples each time
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


_TAKES_SECONDS = {"pt2e"}
"""Parameters of slow tests: the mode that exports."""

_VARIES_X86 = {"onednn", "fbgemm", "qnnpack", "tensorrt"}
"""Parameters of nightly tests: backends that differ from x86 in a kernel's limits."""

_FOLDERS = (
    *("artifact", "callbacks", "export", "layers", "measure", "modes", "numerics", "recipes", "rehearsal"),
    *("sensitivity", "settings", "stress"),
)

_IN_EVERY_RUN = {
    "test_every_pair.py",
    "test_every_kind.py",
    "test_evaluate.py",
    "test_round_trip.py",
    "test_schedule_in_trainer.py",
}
"""Files whose tests of these are in every run: each mode and backend by one table, and a fit and its file in pt2e."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let ``--device cpu`` run the tests marked ``gpu`` without a GPU."""
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="of the tests marked gpu")


@pytest.hookimpl(tryfirst=True)  # before what is slow is deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need a missing backend or GPU.

    Tests that take seconds and have a counterpart in mode eager or fx with backend x86 are marked as slow, and as
    nightly if they differ in the backend alone.
    """
    here = Path(__file__).parent
    no_gpu = config.getoption("--device") == "cuda" and not torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.slow)
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
        backend = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
        if isinstance(backend, str) and backend in BACKENDS and (why := missing(backend)):
            item.add_marker(pytest.mark.skip(reason=why))
        folder = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        if (folder not in _FOLDERS and folder != "test_docs.py") or item.path.name in _IN_EVERY_RUN:
            continue
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        words = {value for value in values if isinstance(value, str)}
        if words & (_TAKES_SECONDS | _VARIES_X86):
            item.add_marker(pytest.mark.slow)
        if words & _VARIES_X86:
            item.add_marker(pytest.mark.nightly)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Random numbers of a shared fixture do not depend on the tests that ran before it was needed."""
    if fixturedef.scope != "function":
        _seed()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Random numbers in a test do not depend on earlier tests, and a Trainer's ``deterministic=True`` is reset."""
    _seed()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _wandb_of_its_own() -> None:
    """Child processes of a test have their own W&B service.

    W&B passes its running service to child processes in an environment variable, and that service resolves relative
    folders from the folder of its own parent, not from the child's.
    """
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture(scope="module")
def without_compiler() -> Iterator[None]:
    """Networks of mode pt2e run op by op, which saves seconds of compiling each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_LIGHTNING_COMPILE", "0")
        yield


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder in fsspec's memory, emptied afterwards."""
    system = fsspec.filesystem("memory")
    yield "memory://bucket"
    if system.exists("/bucket"):
        system.rm("/bucket", recursive=True)
