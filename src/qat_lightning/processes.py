"""Doing something in one process on behalf of all, with errors that reach every process.

Every function here except `process_count`, `is_first_process` and `several_processes` is a collective: every process
has to call it, in the same order. An error in one process is raised in all of them, so that none waits for an answer
that never comes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qat_lightning import errors
from qat_lightning.errors import QuantizationError

T = TypeVar("T")


def process_count() -> int:
    """Return the number of processes of the training; 1 outside of distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    return process_count() == 1 or dist.get_rank() == 0


def several_processes(trainer: Any) -> bool:
    """Whether the hooks of a Trainer run in several processes that can communicate."""
    return trainer.world_size > 1 and process_count() > 1


def range_over_all(low: Tensor, high: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest low and the largest high over the processes whose batch was finite."""
    none = torch.full_like(low, -torch.inf)
    bounds = torch.stack([torch.where(finite, -low, none), torch.where(finite, high, none)])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    return -bounds[0], bounds[1], torch.isfinite(bounds).all()


def sum_over_all(counts: Tensor) -> Tensor:
    """The sum of the counts of all processes, in place."""
    dist.all_reduce(counts)
    return counts


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true in at least one process."""
    return any(_gather(flag))


def all_alike(flag: bool, what: str, device: torch.device) -> bool:
    """Whether ``flag`` is true and ``what`` is equal in every process; in one small reduction.

    Args:
        flag: The value in this process.
        what: Compared by its checksum.
        device: The training's device; its processes may be able to exchange tensors on that device only.
    """
    checksum = zlib.crc32(what.encode())
    found = torch.tensor([float(not flag), checksum, -checksum], dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    some, most, least = found.tolist()
    return not some and most == -least


def in_first(do: Callable[[], T]) -> T:
    """Call ``do`` in the first process only.

    Args:
        do: Its result has to be picklable.

    Returns:
        The result of ``do``, in every process.

    Raises:
        QuantizationError: It failed. The first process raises the original error.
    """
    made = in_all(lambda: do() if dist.get_rank() == 0 else None)
    box: list[Any] = [made]
    dist.broadcast_object_list(box, src=0)
    result: T = box[0]
    return result


def in_all(do: Callable[[], T]) -> T:
    """Call ``do`` in every process, and continue only if it succeeds in all.

    Raises:
        QuantizationError: It failed in another process, which the message names. A process in which it failed raises
            its own error.
    """
    error: Exception | None = None
    try:
        result = do()
    except Exception as raised:  # noqa: BLE001 - raised again, once the others know
        error = raised
    failures = _gather(None if error is None else (type(error).__name__, str(error)))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            name, message = failure
            raise _as_ours(name, message, rank)
    return result


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _as_ours(name: str, message: str, rank: int) -> QuantizationError:
    """The error of another process; of the same type if that is a type of this package."""
    found = getattr(errors, name, None)
    if isinstance(found, type) and issubclass(found, QuantizationError):
        return found(f"Process {rank} of this training: {message}")
    return errors.ConversionError(f"Process {rank} of this training failed with {name}: {message}")
