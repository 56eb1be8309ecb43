"""Settings that hold for every test."""

import os
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

import pytest
import torch
from hypothesis import settings

# a busy machine is no failure; and CI tries the same examples each time
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """What a test draws is the same whatever ran before it, and a Trainer's ``deterministic=True`` ends with it."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
