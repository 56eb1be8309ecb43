"""Hooks in a graph: what a trace merged is not called, or returns the output of several layers at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.graph.hooks import users_hooks
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.modes.tracing import same_results


def refuse_hooks(network: nn.Module, example: Example, mode: str, *, called: Collection[str] = ()) -> None:
    """Raise an error for hooks that look at modules from outside, which a graph would leave out.

    A hook that the network's result depends on is part of the network, and of its graph.

    Args:
        network: The float network; it stays as it is.
        example: One call.
        mode: The mode, which makes a graph of the network.
        called: Names of modules that are called as in the float network, also in the int8 network.

    Raises:
        TraceError: There are such hooks; the message names their modules.
    """
    found = [
        name
        for name, module in network.named_modules()
        if name not in called
        and any(not _takes_part(network, example, table, key) for table, key in list(users_hooks(module)))
    ]
    if found:
        shown = ", ".join(repr(name) if name else "the network itself" for name in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise TraceError(
            f"{type(network).__name__} has hooks on {shown}{more}. The graph of mode={mode!r} merges layers, so a hook "
            "would not be called, or would see the output of several layers at once, as of a convolution with its "
            "BatchNorm and ReLU. What to do: use mode='eager', which calls every module and its hooks, or return from "
            "forward what the hooks collect, or remove them."
        )


_FAILED = object()


def _takes_part(network: nn.Module, example: Example, table: dict[int, Callable[..., Any]], key: int) -> bool:
    """Whether the network returns something else without a hook, or fails."""
    for training in (False, True):
        wanted = _result(network, example, training)
        with _without(table, key):
            got = _result(network, example, training)
        if wanted is not _FAILED and not same_results(wanted, got):
            return True
    return False


def _result(network: nn.Module, example: Example, training: bool) -> Any:
    try:
        return run_apart(network, example, _training(network, training))
    except Exception:  # noqa: BLE001 - without a hook that it needs, or in training, as a BatchNorm on a single value
        return _FAILED


@contextmanager
def _training(network: nn.Module, training: bool) -> Iterator[None]:
    network.train(training)
    yield


@contextmanager
def _without(table: dict[int, Callable[..., Any]], key: int) -> Iterator[None]:
    """Within the block a table lacks one hook; its order stays."""
    before = dict(table)
    del table[key]
    try:
        yield
    finally:
        table.clear()
        table.update(before)
