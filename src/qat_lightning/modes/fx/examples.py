"""The example in several sizes, as metadata: shapes, dtypes and devices of each value in a trace, without the values.

A size that is the same in all calls is a constant of the network. A size that differs in one call depends on what that
call
varies: the number of samples, or the height, width or length of the inputs.
"""

from __future__ import annotations

import copy
import logging
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qat_lightning.graph.example import Example
from qat_lightning.graph.signature import batch_size, has_batch
from qat_lightning.graph.structures import look_into
from qat_lightning.modes.prepared import copy_of_modules

_LOG = logging.getLogger("torch._subclasses.fake_tensor")
"""Upstream logs failures of these runs, which are expected here."""

EXAMPLE, MORE, ONE = "the example", "more samples", "one sample"
LARGER, NUMBERS = "another size", "other numbers"
"""The calls to follow; in the last one, the numbers among the inputs differ."""


class CallFails(BaseException):
    """One of the calls fails although the example works; not an `Exception`, which a ``forward`` might catch.

    Args:
        call: Name of the call.
    """

    def __init__(self, call: str) -> None:
        super().__init__(call)
        self.call = call


@dataclass(frozen=True)
class Plan:
    """Which calls to follow through a network besides the example itself.

    Attributes:
        samples: Those of `MORE` and `ONE` to follow.
        grows: Which dimensions differ in `LARGER`: ``"image"`` for all after the second, ``"length"`` for all but the
            first that equal the second dimension of the first input, ``"indices"`` for all that equal the last
            dimension of the first input of integers that is not the batch; empty for no such call.
        numbers: Whether to follow `NUMBERS`.
    """

    samples: tuple[str, ...] = (MORE, ONE)
    grows: str = ""
    numbers: bool = False

    @property
    def calls(self) -> tuple[str, ...]:
        """The names of all calls, the example first."""
        return (EXAMPLE, *self.samples, *([LARGER] if self.grows else []), *([NUMBERS] if self.numbers else []))

    @property
    def is_last(self) -> bool:
        """Whether everything but the number of samples is as in the example."""
        return not (self.grows or self.numbers)

    def fixing(self, call: str) -> Plan:
        """The plan without variation of whatever differs in ``call``, `LARGER` or `NUMBERS`."""
        return Plan(self.samples, "" if call == LARGER else self.grows, self.numbers and call != NUMBERS)

    def without(self, call: str, example: Example) -> Plan:
        """The plan without a call that fails; without `MORE`, no other number of samples is tried."""
        if call == LARGER:
            return Plan(self.samples, next(_ways(example, after=self.grows), ""), self.numbers)
        if call == NUMBERS:
            return self.fixing(NUMBERS)
        return Plan((MORE,) if call == ONE else (), self.grows, self.numbers)


def first_plan(example: Example) -> Plan:
    """The plan with all calls that are possible for an example."""
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    return Plan(grows=next(_ways(example), ""), numbers=any(map(is_number, leaves)))


def is_number(leaf: Any) -> bool:
    """Whether an input is a number other than a flag."""
    return isinstance(leaf, (int, float)) and not isinstance(leaf, bool)


def _ways(example: Example, after: str = "") -> Iterator[str]:
    """Ways in which the size of inputs can vary, beginning after ``after``."""
    ways = ("image", "length", "indices")
    tensors = _tensors(example)
    tried = [[list(leaf.shape) for leaf in tensors]]
    for way in ways:
        shapes = [_larger(leaf, example, way) for leaf in tensors]
        if shapes not in tried and (not after or ways.index(way) > ways.index(after)):
            yield way
        tried.append(shapes)


class Calls:
    """Runs single operations for each call of a plan, on tensors without values.

    Args:
        example: One call.
        plan: The calls.
    """

    def __init__(self, example: Example, plan: Plan) -> None:
        look_into(example.args, example.kwargs)
        self.names = plan.calls
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._copies: dict[nn.Module, nn.Module] = {}
        self.running = False
        made = {
            EXAMPLE: lambda leaf: leaf.shape,
            MORE: lambda leaf: _samples(leaf, example, lambda size: 2 * size + 3),
            ONE: lambda leaf: _samples(leaf, example, lambda size: 1),
            LARGER: lambda leaf: _larger(leaf, example, plan.grows),
            NUMBERS: lambda leaf: leaf.shape,
        }
        self.inputs = [self._as_fake(example, made[name], other=name == NUMBERS) for name in self.names]

    def _as_fake(self, example: Example, shape: Callable[[Tensor], Any], *, other: bool) -> Example:
        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return 2 * leaf + 1 if other and is_number(leaf) else leaf
            with self._mode:
                return torch.empty(tuple(shape(leaf)), dtype=leaf.dtype)

        return Example(*pytree.tree_map(fake, (example.args, example.kwargs)))

    def known(self, root: nn.Module, path: str) -> tuple[Any, ...] | None:
        """A tensor of the network in each call; None if it is not a tensor."""
        with self.aside():
            tensor = operator.attrgetter(path)(root)
        if not isinstance(tensor, Tensor):
            return None
        fake = tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor, static_shapes=True)
        return tuple(fake for _ in self.names)

    def run(self, node: fx.Node, values: dict[fx.Node, tuple[Any, ...]], root: nn.Module) -> tuple[Any, ...] | None:
        """The result of a node in each call; None if it depends on values of tensors.

        Raises:
            CallFails: It fails in one of the other calls.
        """
        if any(source not in values for source in node.all_input_nodes):
            return None
        results = []
        for number, name in enumerate(self.names):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), _nth(values, number))
            try:
                results.append(self._run(node, args, kwargs, root))
            except Exception as error:  # unknown, for any error
                if number == 0:
                    return None
                raise CallFails(name) from error
        return tuple(results)

    def _run(self, node: fx.Node, args: Any, kwargs: Any, root: nn.Module) -> Any:
        with self.aside(), torch.no_grad():
            if node.op == "call_module":
                return self._call(root.get_submodule(str(node.target)), args, kwargs)
            with self._mode:
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                target: Any = node.target
                return target(*args, **kwargs)

    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module outside of the trace, on a copy if it may store state."""
        if not type(module).__module__.startswith("torch.nn."):
            module = self._copies.setdefault(module, copy_of_modules(module))
        try:
            with self._mode:
                return module(*args, **kwargs)
        except Exception:  # noqa: BLE001 - it may look at values, or at the memory of tensors
            given = pytree.tree_map(_with_values, (args, kwargs))
            result = copy.deepcopy(module)(*given[0], **given[1])
            look_into(result)
            return pytree.tree_map(
                lambda leaf: self._mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, result
            )

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the block, calls are not traced, and do not change the random state of the process."""
        state, before, silenced = random.getstate(), self.running, _LOG.disabled
        self.running = _LOG.disabled = True
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            self.running, _LOG.disabled = before, silenced
            random.setstate(state)


def _nth(values: dict[fx.Node, tuple[Any, ...]], number: int) -> Callable[[fx.Node], Any]:
    return lambda node: values[node][number]


def _samples(leaf: Tensor, example: Example, number: Callable[[int], int]) -> list[int]:
    size = batch_size(example)
    return [number(leaf.shape[0]), *leaf.shape[1:]] if has_batch(leaf, size) else list(leaf.shape)


def _larger(leaf: Tensor, example: Example, grows: str) -> list[int]:
    if grows == "image":
        return [size if dim < 2 else 2 * size for dim, size in enumerate(leaf.shape)]
    tensors = _tensors(example)
    if grows == "length":
        length = next((other.shape[1] for other in tensors if other.ndim > 1), None)
        return [2 * size if dim and size == length else size for dim, size in enumerate(leaf.shape)]
    batch = batch_size(example)
    counts = [other.shape[-1] for other in tensors if other.ndim and not other.is_floating_point()]
    count = next((count for count in counts if count != batch), None)
    return [2 * size if size == count else size for size in leaf.shape]


def _tensors(example: Example) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((example.args, example.kwargs)) if isinstance(leaf, Tensor)]


def _with_values(leaf: Any) -> Any:
    if not isinstance(leaf, FakeTensor):
        return leaf
    plain = torch.zeros(leaf.shape, dtype=leaf.dtype)
    return torch.randn(leaf.shape, dtype=leaf.dtype) if leaf.is_floating_point() else plain
