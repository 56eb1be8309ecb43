"""Plain attributes in which a forward counts, such as its steps, and which a graph has as constants."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.modes.plain_attributes import Attributes, attributes_like, differing, set_attributes
from qat_lightning.modes.prepared import copy_of_modules

_MANY = 10**6
"""Calls after which a number is asked for once more, since it may matter only beyond a limit."""


def refuse_counted(
    network: nn.Module, example: Example, trace: Callable[[nn.Module], fx.GraphModule], *, learns: bool
) -> None:
    """Raise an error for attributes that each call changes, and that what it computes depends on.

    A number that is only counted, or noted once, such as a size or whether a table exists, may change.

    Args:
        network: The float network; it stays as it is.
        example: One call.
        trace: Traces a network.
        learns: Whether the graph is to be trained; otherwise only the call in evaluation counts.

    Raises:
        TraceError: There are such attributes; the message names them.
    """
    settled = copy_of_modules(network)
    list(_calls(settled, example, learns=learns))
    copied = copy_of_modules(settled)
    before = attributes_like(settled, settled)
    counted: Attributes = {}
    for after in _calls(copied, example, learns=learns):
        for path, values in differing(before, after).items():
            counted.setdefault(path, {}).update(values)
    if not counted:
        return
    wanted = _described(copy_of_modules(settled), trace)

    def matter(values: Attributes) -> bool:
        other = copy_of_modules(settled)
        set_attributes(other, values)
        return not _same(wanted, _described(other, trace))

    for values in (counted, _far(counted)):
        if matter(values):
            each = [(path, name) for path, own in values.items() for name in own]
            alone = [(path, name) for path, name in each if matter({path: {name: values[path][name]}})]
            raise _error(network, [join(path, name) for path, name in alone or each])


def _calls(network: nn.Module, example: Example, *, learns: bool) -> Iterator[Attributes]:
    """Call a network in training and in evaluation; its plain attributes after each call."""
    state = random.getstate()
    for training in (True, False) if learns else (False,):
        # What does not run in training, as a BatchNorm on a single value, is not traced either.
        with contextlib.suppress(Exception):
            run_apart(network, example, _in_mode(network, training))
        random.setstate(state)
        yield attributes_like(network, network)


@contextmanager
def _in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    network.train(training)
    yield


def _far(value: Any) -> Any:
    """The same values, with other numbers."""
    if isinstance(value, dict):
        return {key: _far(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_far, value))
    return value + _MANY if type(value) in (int, float) else value


_Described = tuple[str, dict[str, str], dict[str, Tensor]]
"""A graph, the modules that its trace has made, and its constants."""


def _described(network: nn.Module, trace: Callable[[nn.Module], fx.GraphModule]) -> _Described | None:
    """What a trace of a network has computed; None if it has none."""
    own = {name: type(module) for name, module in network.named_modules(remove_duplicate=False)}
    tensors = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    try:
        root = trace(network)
    except TraceError:
        return None
    for node in reversed(list(root.graph.nodes)):
        if not node.users and _is_arithmetic(node.target):
            root.graph.erase_node(node)  # of a number that is only counted
    # A module of the network that is called as a whole counts for itself.
    made = {name: module for name, module in root.named_modules() if name and _is_made(module, own.get(name))}
    constants = {str(node.target) for node in root.graph.find_nodes(op="get_attr")} - tensors
    return (
        str(root.graph),
        {name: str({k: v for k, v in vars(module).items() if k[0] != "_"}) for name, module in made.items()},
        {name: value for name in constants if isinstance(value := getattr(root, name, None), Tensor)},
    )


def _is_made(module: nn.Module, own: type | None) -> bool:
    """Whether a trace has made a module, such as a dropout for its function."""
    return type(module) is not own and type(module).__module__.partition(".")[0] in ("torch", "qat_lightning")


def _is_arithmetic(target: Any) -> bool:
    """Whether a function is an operator that changes nothing in place."""
    name = getattr(target, "__name__", "")
    return getattr(target, "__module__", "") == "_operator" and not name.startswith(("i", "set"))


def _same(one: _Described | None, other: _Described | None) -> bool:
    if one is None or other is None:
        return one is other
    return one[:2] == other[:2] and all(torch.equal(value, other[2][name]) for name, value in one[2].items())


def _error(network: nn.Module, names: list[str]) -> TraceError:
    own = names[0].rpartition(".")[2]
    return TraceError(
        f"mode='fx' keeps a graph of {type(network).__name__}.forward, which changes {', '.join(map(repr, names[:5]))} "
        "with every call and computes with it: the graph would keep the value of its trace. What to do: for a number, "
        f"make it a buffer, self.register_buffer({own!r}, torch.tensor(...)), and change it in place, "
        f"self.{own}.add_(1), or .add_(int(self.training)) to count in training only; or use mode='eager', which runs "
        "forward itself, or mode='auto'."
    )
