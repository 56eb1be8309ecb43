"""Which backends can be prepared here: the packages of some are not in the lock."""

from __future__ import annotations

import functools

import pytest

from qat_lightning.errors import MissingExtraError
from qat_lightning.settings.backends import BACKENDS, require


@functools.cache
def missing(backend: str) -> str:
    """What is missing, in words; empty if nothing is."""
    try:
        require(BACKENDS[backend])
    except MissingExtraError as error:
        return str(error)
    return ""


def skipped_without(backend: str) -> tuple[pytest.MarkDecorator, ...]:
    """Marks of a test that needs what ``backend`` needs."""
    return (pytest.mark.skip(reason=why),) if (why := missing(backend)) else ()
