"""Running a network for what it calls and how much it would multiply, without the arithmetic itself."""

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
    """What can be seen of a network while a copy of it runs: on shapes alone, or on values where it looks at these.

    Args:
        network: Stays as it is. It has run on the same inputs before, so that whatever its code keeps of a run for the
            next one is made of values.
        look: Runs the copy, within the context that it is given. It is called a second time, with another copy and a
            context that does nothing, for a network that cannot run on shapes.
    """
    try:
        return look(_sharing(network), shapes())
    except Exception:  # noqa: BLE001 - whatever it is, a run on values says it again if it is the network's own
        return look(copy.deepcopy(network).cpu().float(), nullcontext())


def shapes() -> AbstractContextManager[Any]:
    """Within it, tensors have shapes and types and no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _sharing(network: nn.Module) -> nn.Module:
    """A copy on the CPU and in float32; its tensors are the network's own where these are that already."""
    tensors = [*network.parameters(), *network.buffers()]
    if all(t.device.type == "cpu" and t.dtype not in (torch.float64, torch.float16, torch.bfloat16) for t in tensors):
        return copy_of_modules(network)
    return copy.deepcopy(network).cpu().float()


@contextmanager
def nested(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    """All of several contexts, the last one innermost."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
