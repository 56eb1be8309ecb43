"""Activation checkpointing: the recomputation in the backward pass rounds as the forward pass did.

`torch.utils.checkpoint` drops the tensors of a part of a network, and runs that part again when the backward pass needs
them. By then ranges have moved, BatchNorm has other statistics, and tensors are other objects. So the decisions of a
part in its forward pass (whether and to which grid it rounds, by which factor a weight is folded, the marks on tensors)
are recorded on a tape, in order, and read from it when the part runs again. No range is updated twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint as upstream

_T = TypeVar("_T")


class _Here(threading.local):
    """The parts that are running in this thread, the outermost first; a backward pass may use another thread."""

    def __init__(self) -> None:
        self.running: list[_Run] = []


class _Run:
    """One run of a part: the first, which writes its tape, or a later one, which reads it."""

    def __init__(self, tape: list[Any], *, again: bool) -> None:
        self.tape, self.again, self.position = tape, again, 0


_here = _Here()


def recomputes() -> bool:
    """Whether a part of a network is being recomputed for the backward pass."""
    return not torch.compiler.is_compiling() and any(run.again for run in _here.running)


def decided_once(decide: Callable[[], _T]) -> _T:
    """The result of ``decide``; when a part is recomputed, the result of its first run.

    Args:
        decide: Returns a value that is not changed afterwards. Each run of a part calls this function in the same
            order.
    """
    # While a graph is traced, upstream's compiler does its own recomputation.
    if torch.compiler.is_compiling() or not _here.running:
        return decide()
    running = _here.running
    replayed = next((run for run in running if run.again), None)
    if replayed is None or replayed.position == len(replayed.tape):
        value = decide()
    else:
        value = replayed.tape[replayed.position]
        replayed.position += 1
    for run in running:
        if not run.again:
            run.tape.append(value)
    return value


class _Tape:
    """Records the decisions of a part in its first run, and replays them in all others."""

    def __init__(self) -> None:
        self.written: list[Any] | None = None
        self.runs: list[_Run] = []

    def __enter__(self) -> None:
        again = self.written is not None
        if self.written is None:
            self.written = []
        self.runs.append(_Run(self.written, again=again))
        _here.running.append(self.runs[-1])

    def __exit__(self, *exception: Any) -> None:
        _here.running.remove(self.runs.pop())


class _Both:
    """Two context managers as one that can be entered several times."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.inner.__exit__(*exception)
        self.outer.__exit__(*exception)


_OLD, _NEW = "_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"
_NAME = _NEW if hasattr(upstream, _NEW) else _OLD
"""The function that ``checkpoint`` calls; `_OLD` (before torch 2.15) takes the contexts third, `_NEW` by keyword."""

_non_reentrant: Callable[..., Any] = getattr(upstream, _NAME)
_Reentrant = upstream.CheckpointFunction


def _with_tape(*args: Any, **settings: Any) -> Any:
    tape = _Tape()
    context_fn = settings["context_fn"] if _NAME == _NEW else args[2]

    def contexts() -> tuple[Any, Any]:
        forward, again = context_fn()
        return _Both(forward, tape), _Both(again, tape)

    if _NAME == _NEW:
        return _non_reentrant(*args, **settings | {"context_fn": contexts})
    return _non_reentrant(*args[:2], contexts, *args[3:], **settings)


class _ReentrantWithTape(_Reentrant):
    """Upstream's function, which calls its argument once in the forward and once in the backward pass."""

    @classmethod
    def apply(cls, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function`` with a tape."""
        tape = _Tape()

        def with_tape(*inputs: Any) -> Any:
            with tape:
                return function(*inputs)

        return _Reentrant.apply(with_tape, *args)


def keep_tapes() -> None:
    """Give every part that is checkpointed from now on a tape; networks without fake-quant are not affected."""
    setattr(upstream, _NAME, _with_tape)
    upstream.CheckpointFunction = _ReentrantWithTape  # type: ignore[misc]


class Checkpointed(Exception):
    """Activation checkpointing was used where it is not supported."""


@contextmanager
def no_checkpoints() -> Iterator[None]:
    """Within the block, raise `Checkpointed` where a network begins a checkpointed part.

    Works under whatever name ``checkpoint`` was imported: the function that it calls is replaced.
    """

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Checkpointed

    class Refusing(_Reentrant):
        apply = staticmethod(refuse)

    before = getattr(upstream, _NAME), upstream.CheckpointFunction
    setattr(upstream, _NAME, refuse)
    upstream.CheckpointFunction = Refusing  # type: ignore[misc]
    try:
        yield
    finally:
        setattr(upstream, _NAME, before[0])
        upstream.CheckpointFunction = before[1]  # type: ignore[misc]
