"""One run of a network in which channels have numbers, and rules for passing these on.

Ops that only move values, or mix positions within each channel, pass the numbers on in the same way: reshaping, heads
of attention, repeated keys and values, slices of packed projections. A recipe adds rules for producers of channels and
for ops that it supports. Channels that reach any other op are stuck.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from qat_lightning.layers.operators import names_of
from qat_lightning.modes.eager.observation import function_name
from qat_lightning.recipes.channel_numbers import Where, distinct, thin, where


def named(*rows: str) -> frozenset[str]:
    """The function names of some rows of the table of operators."""
    return names_of(lambda row: row.name in rows)


_FRESH = frozenset({"zeros_like", "ones_like", "new_zeros", "getattr", "alpha_dropout", "feature_alpha_dropout"})
_MOVES = names_of(lambda row: row.moves) - _FRESH
SAME = named("to", "detach", "clone", "contiguous", "dropout")
"""Functions that return the same values in the same places."""
_JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
MIXES = frozenset({"matmul", "__matmul__", "bmm"})
ATTENTION = frozenset({"scaled_dot_product_attention", "attend"})
PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__"})
SUMS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})


@dataclass
class _Known:
    """What is known about one version of a tensor."""

    version: int
    numbers: Tensor | None
    made_by: str


Handed = list[Tensor]
Handler = Callable[..., Any]
"""Called with the run, the function, its arguments, the numbers of its tensors by id, its result, and a list to which
it adds the tensors whose numbers it passes on; returns the numbers of the result.
"""


class NumberedRun(TorchFunctionMode):
    """What one run of a network shows about its channels.

    Attributes:
        handlers: Sets of function names with their handlers; the first match is used.
        stuck: Numbers of channels that reach an unsupported op, and that op.
        count: Number of numbers.
    """

    handlers: ClassVar[tuple[tuple[frozenset[str], Handler], ...]] = ()

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.stuck: dict[int, str] = {}
        self.count = 0
        self._known = WeakTensorKeyDictionary()
        self._names = WeakTensorKeyDictionary()
        self._uses: Counter[Where] = Counter()
        for name, parameter in network.named_parameters():
            self._names[parameter] = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and process the numbers in the same way."""
        kwargs = kwargs or {}
        name = function_name(func)
        if name is None:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        numbered = [tensor for tensor in tensors if self.numbers(tensor) is not None]
        before = [(tensor, self.numbers(tensor)) for tensor in numbered]
        result = func(*args, **kwargs)
        handed_on: list[Tensor] = []
        handle = self._handler(name)
        numbers = handle(self, func, args, kwargs, dict_of(before), result, handed_on) if handle else None
        if name in _MOVES or name in SAME:
            self._name_parts(tensors, result)
        else:
            self._count_uses(tensors)
        for tensor, own in before:
            if not any(tensor is one for one in handed_on):
                self.stick(own, name)
        self._note(result, numbers, name, tensors)
        return result

    def _handler(self, name: str) -> Handler | None:
        for names, handle in self.handlers:
            if name in names:
                return handle
        return None

    # What is known

    def numbers(self, tensor: Tensor) -> Tensor | None:
        """The number of the channel of each value, -1 for none; None if nothing is known."""
        known: _Known | None = self._known.get(tensor)
        return known.numbers if known is not None and known.version == tensor._version else None

    def know(self, tensor: Tensor, numbers: Tensor) -> None:
        """Set the numbers of a tensor that was not returned by a function."""
        self._known[tensor] = _Known(tensor._version, numbers, "")

    def made_by(self, tensor: Tensor) -> str:
        """The function that returned a tensor; empty if it is an input."""
        known: _Known | None = self._known.get(tensor)
        return known.made_by if known is not None else ""

    def name_of(self, tensor: Any) -> str | None:
        """The name of the parameter that a tensor is or is a part of."""
        found: str | None = self._names.get(tensor) if isinstance(tensor, Tensor) else None
        return found

    def used_once(self, tensor: Tensor) -> bool:
        """Whether a parameter has a single reader in the network."""
        return self._uses[where(tensor)] == 1

    def new_numbers(self, count: int) -> Tensor:
        """Unused numbers."""
        self.count += count
        return torch.arange(self.count - count, self.count, dtype=torch.int32)

    def stick(self, numbers: Tensor | None, reader: str) -> None:
        """Mark channels as stuck in an unsupported reader."""
        if numbers is not None:
            for number in distinct(numbers):
                self.stuck.setdefault(number, reader)

    def stick_results(self, result: Any) -> None:
        """Mark the channels of a network's result as stuck."""
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self.numbers(leaf) is not None:
                self.stick(self.numbers(leaf), "the network's result")

    def _name_parts(self, tensors: list[Tensor], result: Any) -> None:
        """Record that a slice of a parameter is a part of it."""
        for tensor in tensors:
            name = self.name_of(tensor)
            for leaf in tree_leaves(result) if name is not None else ():
                shared = isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() == (
                    tensor.untyped_storage().data_ptr()
                )
                if shared and leaf is not tensor:
                    self._names[leaf] = name
                elif not shared:
                    self._uses[where(tensor)] += 1

    def _count_uses(self, tensors: list[Tensor]) -> None:
        seen = {where(tensor) for tensor in tensors if self.name_of(tensor) is not None}
        self._uses.update(seen)

    def _note(self, result: Any, numbers: Any, name: str, tensors: list[Tensor]) -> None:
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        found = [leaf for leaf in tree_leaves(numbers) if isinstance(leaf, Tensor)] if numbers is not None else []
        for index, leaf in enumerate(leaves):
            own = found[index] if len(found) == len(leaves) and found[index].shape == leaf.shape else None
            if own is not None and not bool((thin(own) >= 0).any()):
                own = None
            if own is None and any(leaf is tensor for tensor in tensors) and name in SAME:
                continue
            # Functions that only move values are not the reason why a factor cannot pass.
            moved = (name in _MOVES or name in SAME) and tensors
            self._known[leaf] = _Known(leaf._version, own, (self.made_by(tensors[0]) or name) if moved else name)


def dict_of(pairs: list[tuple[Tensor, Tensor | None]]) -> dict[int, Tensor]:
    """Numbers by the id of their tensors."""
    return {id(tensor): numbers for tensor, numbers in pairs if numbers is not None}


def move(run: NumberedRun, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """Move the numbers like the values."""
    if not known:
        return None
    fill = func.__name__ in _JOINS

    def number(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in known:
            on.append(leaf)
            return known[id(leaf)]
        return torch.full_like(leaf, -1, dtype=torch.int32) if fill else leaf

    args, kwargs = tree_map(number, args), tree_map(number, kwargs)
    try:
        return func(*args, **kwargs)
    except RuntimeError:  # a view of an expanded tensor
        args, kwargs = tree_map(_dense, args), tree_map(_dense, kwargs)
        return func(*args, **kwargs)


def _dense(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf


def keep(run: NumberedRun, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """Return the numbers unchanged."""
    if not args or id(args[0]) not in known or not isinstance(result, Tensor) or not result.is_floating_point():
        return None
    on.append(args[0])
    return known[id(args[0])]


def attend(
    run: NumberedRun, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed
) -> Any:
    """Attention: each output position is a mean of values, within each channel."""
    value = kwargs["value"] if "value" in kwargs else args[2]
    mixed = result[0] if isinstance(result, tuple) else result
    return _mixed(value, mixed, known, on, (None,) if isinstance(result, tuple) else ())


def mix(run: NumberedRun, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """A product with attention weights, written out by the network."""
    return _mixed(args[1], result, known, on, ()) if len(args) > 1 else None


def _mixed(value: Any, mixed: Tensor, known: dict[int, Tensor], on: Handed, more: tuple[Any, ...]) -> Any:
    numbers = known.get(id(value))
    if numbers is None or numbers.dim() < 2 or not bool((numbers == numbers[..., :1, :]).all()):
        return None
    own = numbers[..., :1, :]
    heads = own.shape[-3] if own.dim() > 2 else 1
    if heads not in (1, mixed.shape[-3]):  # enable_gqa: several queries share a head
        own = own.repeat_interleave(mixed.shape[-3] // heads, -3)
    on.append(value)
    return own.expand(mixed.shape) if not more else (own.expand(mixed.shape), torch.full((1,), -1))


MOVING: tuple[tuple[frozenset[str], Handler], ...] = ((_MOVES | _JOINS, move), (ATTENTION, attend), (MIXES, mix))
"""Functions that move values, and functions that mix positions."""
