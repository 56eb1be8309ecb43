"""Running a network to see what it calls and how much it multiplies, without the arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qat_lightning.modes.prepared import copy_of_modules

T = TypeVar("T")


def on_a_copy(network: nn.Module, look: Callable[[nn.Module, AbstractContextManager[Any]], T]) -> T:
    """Inspect a network while a copy of it runs, on fake tensors if possible, otherwise on real ones.

    Args:
        network: Not changed. It has run on the same inputs before, so that state which its code keeps between runs
            consists of real tensors.
        look: Runs the copy within the given context. If the network cannot run on fake tensors, it is called again with
            another copy and a context that does nothing.
    """
    try:
        return look(_sharing(network), shapes())
    except Exception:  # noqa: BLE001 - if the error is the network's own, the run on values raises it again
        return look(copy.deepcopy(network).cpu().float(), nullcontext())


def shapes() -> AbstractContextManager[Any]:
    """Within it, tensors have shapes and dtypes but no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _sharing(network: nn.Module) -> nn.Module:
    """A copy on the CPU in float32; shares the network's tensors if they are already there."""
    tensors = [*network.parameters(), *network.buffers()]
    if all(t.device.type == "cpu" and t.dtype not in (torch.float64, torch.float16, torch.bfloat16) for t in tensors):
        return copy_of_modules(network)
    return copy.deepcopy(network).cpu().float()


@contextmanager
def nested(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    """Several contexts as one, the last one innermost."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
