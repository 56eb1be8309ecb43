"""Freeing the memory that torch keeps of a network after preparing, converting or capturing it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_REMEMBERING = (
    ("torch.ao.quantization.fx.utils", "assert_and_get_unique_device"),
    ("torchao.utils", "_assert_and_get_unique_device"),
)
"""Functions with an unbounded cache whose keys are modules, so that every network they saw is kept with its weights."""

_CAPTURING = "torch._dynamo.functional_export"
"""Dynamo stores the graph of each capture, which holds the network, in the globals of this module."""

_COMPILED = "__compiled_fn_"


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """Drop torch's references to networks that it saw within the block, or within the decorated function."""
    before = _compiled()
    try:
        yield
    finally:
        for name, function in _REMEMBERING:
            clear = getattr(getattr(sys.modules.get(name), function, None), "cache_clear", None)
            if clear is not None:
                clear()
        for name in _compiled() - before:
            del vars(sys.modules[_CAPTURING])[name]


def _compiled() -> set[str]:
    module = sys.modules.get(_CAPTURING)
    return set() if module is None else {name for name in vars(module) if name.startswith(_COMPILED)}


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Free objects that were created in the block and are only referenced by cycles, such as graphs.

    Older objects are frozen meanwhile, so that the garbage collector skips them: torch and Lightning alone are a
    million objects. With glibc, free memory of the allocator is returned to the system.

    Example:
        >>> with memory_given_back():
        ...     ring: list[object] = []
        ...     ring.append(ring)
        ...     del ring
        >>> gc.get_freeze_count()
        0
    """
    ours = not gc.get_freeze_count()  # objects frozen by other code stay frozen
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if ours:
            gc.unfreeze()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim is not None:
            trim(0)
