"""What torch keeps of a network for good once it prepared, converted or captured it, and how it is given back."""

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
"""Functions with a cache without bounds, whose keys are modules: each network that they saw, with its weights."""

_CAPTURING = "torch._dynamo.functional_export"
"""Dynamo puts the graph of each capture, which holds the network, among the globals of this module."""

_COMPILED = "__compiled_fn_"


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """Let torch forget the networks that it sees within the block, or in a function that this decorates."""
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
    """Free, at the end of the block, what it made and what only refers to itself, as graphs do.

    What was there before is set aside meanwhile, so that nobody looks through it: torch and Lightning alone are a
    million objects. What the allocator keeps is returned to the system, under glibc.

    Example:
        >>> with memory_given_back():
        ...     ring: list[object] = []
        ...     ring.append(ring)
        ...     del ring
        >>> gc.get_freeze_count()
        0
    """
    ours = not gc.get_freeze_count()  # Somebody else's frozen objects stay so.
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
