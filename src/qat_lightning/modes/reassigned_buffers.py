"""Buffers that a forward assigns a new tensor to: a graph keeps computing with the tensor that was there before."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.layers.batchnorm import is_batchnorm
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.modes.prepared import copy_of_modules
from qat_lightning.modes.tracing import WHAT_TO_DO, same_results

_COUNTER = "num_batches_tracked"
"""Counts batches in a BatchNorm, which only computes with it if its momentum is None."""


def refuse_reassigned_buffers(
    network: nn.Module, example: Example, mode: str, *, train: bool = True, graph: fx.GraphModule | None = None
) -> None:
    """Raise an error for buffers through which a call changes the next one by assigning a new tensor to them.

    A table or mask that each call would make alike may be assigned.

    Args:
        network: The float network; it stays as it is.
        example: One call.
        mode: The mode, which keeps a graph of the network.
        train: Whether the graph is to be trained; otherwise only the call in evaluation counts.
        graph: A symbolic trace with the tensors of the network, in which ``self.count += 1`` is an assignment too; what
            a module changes that it calls as a whole is changed in the graph as well.

    Raises:
        TraceError: There are such buffers; the message names them.
    """
    for training in (True, False) if train else (False,):
        names = _carried(copy_of_modules(network), example, graph, training=training)
        if names:
            raise _error(network, mode, names)


def _error(network: nn.Module, mode: str, names: list[str]) -> TraceError:
    shown, own = ", ".join(map(repr, names[:5])), names[0].rpartition(".")[2]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return TraceError(
        f"mode={mode!r} keeps a graph of {type(network).__name__}.forward, which computes with the tensors that its "
        f"buffers hold, and forward assigns a new value to {shown}{more} with every call: in the graph, the old one "
        f"would stay. Write it into the buffer, as self.{own}.copy_(...) does and self.{own} = ... does not. "
        f"{WHAT_TO_DO}"
    )


def _carried(network: nn.Module, example: Example, graph: fx.GraphModule | None, *, training: bool) -> list[str]:
    """The buffers that a call assigns a new tensor to, and which matter to a second, equal call.

    Either the second call changes them once more, or it returns something else than the first one.

    Args:
        network: A network whose attributes may change; its tensors do not.
        example: The call.
        graph: See `refuse_reassigned_buffers`.
        training: Whether the network is in training mode.
    """
    made: dict[str, Tensor | None] = {}
    again: dict[str, Tensor | None] = {}
    state = random.getstate()
    try:
        first = run_apart(network, example, _assigning(network, {}, made, training, in_place=graph is not None))
        if made and graph is not None:
            random.setstate(state)
            copied = copy_of_modules(graph)
            run_apart(copied, example, _leaving(copied, _buffers(network), made, training))
        if not made:
            return []
        random.setstate(state)
        second = run_apart(network, example, _assigning(network, made, again, training))
    except Exception:  # noqa: BLE001 - what does not run in training, as a BatchNorm on a single value, cannot be judged
        return []
    finally:
        random.setstate(state)
    changed = [name for name, value in made.items() if not _equal(value, again[name])]
    return changed if changed or same_results(first, second) else list(made)


@contextmanager
def _assigning(
    network: nn.Module,
    given: Mapping[str, Tensor | None],
    made: dict[str, Tensor | None],
    training: bool,
    *,
    in_place: bool = False,
) -> Iterator[None]:
    """A call of a network.

    Args:
        network: The network.
        given: Values of buffers before the call, by name.
        made: Gets the values afterwards of these buffers; without any, of those that hold another tensor.
        training: Whether the network is in training mode.
        in_place: Whether ``made`` gets buffers with other values in the same tensor too.
    """
    network.train(training)
    modules = dict(network.named_modules())
    for name, value in given.items():
        path, _, own = name.rpartition(".")
        modules[path]._buffers[own] = _copied(value)
    before = _buffers(network)
    values = {name: _copied(buffer) for name, buffer in before.items()} if in_place else {}
    yield
    for name, buffer in _buffers(network).items():
        assigned = name not in before or buffer is not before[name]
        if name in given if given else assigned or (in_place and not _equal(values[name], buffer)):
            made[name] = _copied(buffer)


@contextmanager
def _leaving(
    graph: nn.Module, buffers: Mapping[str, Tensor | None], made: dict[str, Tensor | None], training: bool
) -> Iterator[None]:
    """A call of a graph, after which ``made`` keeps the buffers that it leaves as they are; see `_assigning`.

    What a graph has a BatchNorm for is left to that layer.
    """
    graph.train(training)
    values = {name: _copied(buffers.get(name)) for name in made}
    yield
    present = _buffers(graph)
    layers = {path for path, module in graph.named_modules() if is_batchnorm(module)}
    for name, value in values.items():
        buffer = buffers.get(name)
        of_layer = name.rpartition(".")[0] in layers
        if of_layer or present.get(name, buffer) is not buffer or not _equal(value, buffer):
            del made[name]


def _buffers(network: nn.Module) -> dict[str, Tensor | None]:
    """Buffers by name, except those of a BatchNorm and counters of batches."""
    return {
        join(path, own): buffer
        for path, module in network.named_modules()
        if not is_batchnorm(module)
        for own, buffer in module._buffers.items()
        if own != _COUNTER
    }


def _copied(buffer: Any) -> Any:
    return buffer.detach().clone() if isinstance(buffer, Tensor) else buffer


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    one, other = one.to_dense(), other.to_dense()
    return bool(((one == other) | ((one != one) & (other != other))).all())
