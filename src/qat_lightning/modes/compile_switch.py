"""A switch that keeps int8 networks from being compiled at their first call, for as long as they are only tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ALLOWED: ContextVar[bool] = ContextVar("qat_lightning_compiling_allowed", default=True)


def compiling_allowed() -> bool:
    """Whether the code around allows compiling."""
    return _ALLOWED.get()


@contextmanager
def without_compiling() -> Iterator[None]:
    """Let int8 networks run as decomposed graphs, whatever could be compiled.

    Example:
        >>> with without_compiling():
        ...     compiling_allowed()
        False
    """
    token = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def has_cpp_compiler() -> bool:
    """Whether there is a C++ compiler, which Inductor makes libraries for the CPU with."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return False
    return True
