"""Which variations of a slow test run for every change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def nightly_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values of a parametrized slow test, of which all but ``kept`` are marked ``nightly``.

    Args:
        values: One for each variation; tuples if several parameters have names.
        kept: Those that run for every change.
    """
    return [value if value in kept else _at_night(value) for value in values]


def _at_night(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.nightly)
