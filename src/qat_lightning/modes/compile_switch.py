"""A switch that prevents int8 networks from being compiled on their first call, while they are only tried out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ALLOWED: ContextVar[bool] = ContextVar("qat_lightning_compiling_allowed", default=True)


def compiling_allowed() -> bool:
    """Whether compiling is allowed in the current context."""
    return _ALLOWED.get()


@contextmanager
def without_compiling() -> Iterator[None]:
    """Within the block, int8 networks run as decomposed graphs.

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
    """Whether Inductor finds a C++ compiler, which it needs to compile for the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return False
    return True
