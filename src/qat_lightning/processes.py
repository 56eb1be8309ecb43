"""Doing something in one process for all of a distributed training, with errors that reach every one of them.

Each function here but `process_count`, `is_first_process` and `several_processes` is a collective: every process has to
call it, in the same order. Whatever goes wrong in one of them is raised in all, so that nobody waits for an answer that
never comes.
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
    """How many processes train together; 1 outside of distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    return process_count() == 1 or dist.get_rank() == 0


def several_processes(trainer: Any) -> bool:
    """Whether the hooks of a Trainer run in several processes that can talk to each other."""
    return trainer.world_size > 1 and process_count() > 1


def range_over_all(low: Tensor, high: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The least of the lows and the greatest of the highs, of the processes whose batch was finite."""
    none = torch.full_like(low, -torch.inf)
    bounds = torch.stack([torch.where(finite, -low, none), torch.where(finite, high, none)])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    return -bounds[0], bounds[1], torch.isfinite(bounds).all()


def sum_over_all(counts: Tensor) -> Tensor:
    """The sum of the counts of all processes, in place."""
    dist.all_reduce(counts)
    return counts


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true in one process at least."""
    return any(_gather(flag))


def all_alike(flag: bool, what: str, device: torch.device) -> bool:
    """Whether ``flag`` is true in every process, and ``what`` is the same; in one small reduction.

    Args:
        flag: Of this process.
        what: Compared by its checksum.
        device: That of the training, whose processes may only talk through tensors on it.
    """
    checksum = zlib.crc32(what.encode())
    found = torch.tensor([float(not flag), checksum, -checksum], dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    some, most, least = found.tolist()
    return not some and most == -least


def in_first(do: Callable[[], T]) -> T:
    """Call ``do`` in the first process only.

    Args:
        do: What it returns has to pickle.

    Returns:
        What it returned, in every process.

    Raises:
        QuantizationError: It failed; in the first process the error is its own.
    """
    made = in_all(lambda: do() if dist.get_rank() == 0 else None)
    box: list[Any] = [made]
    dist.broadcast_object_list(box, src=0)
    result: T = box[0]
    return result


def in_all(do: Callable[[], T]) -> T:
    """Call ``do`` in every process, and go on only if it succeeds in all.

    Raises:
        QuantizationError: It failed in another process, which the message names; where it failed, its own error.
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
    """The error of another process, of the same type if it is one of ours."""
    found = getattr(errors, name, None)
    if isinstance(found, type) and issubclass(found, QuantizationError):
        return found(f"Process {rank} of this training: {message}")
    return errors.ConversionError(f"Process {rank} of this training failed with {name}: {message}")
