"""Which variations of a slow test run for every change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def nightly_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values of a parametrized slow test, of which all but ``kept`` are marked ``nightly``."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.nightly) for value in values]
