"""Backends that can be prepared here: the packages of some are not in the lock file."""

from __future__ import annotations

import functools

import pytest

from qat_lightning.errors import MissingExtraError
from qat_lightning.settings.backends import BACKENDS, require


@functools.cache
def missing(backend: str) -> str:
    """What is missing; empty if nothing is."""
    try:
        require(BACKENDS[backend])
    except MissingExtraError as error:
        return str(error)
    return ""


def skipped_without(backend: str) -> tuple[pytest.MarkDecorator, ...]:
    """Marks for a test that needs the packages of ``backend``."""
    return (pytest.mark.skip(reason=why),) if (why := missing(backend)) else ()
