"""Where the channels of linear layers come from: one run of a network in which each channel carries a number.

What makes channels (a linear layer, a LayerNorm, a scale that is multiplied in) numbers them; whatever only moves
values, and what is linear in them, hands the numbers on by doing the same to them: reshaping, heads of attention,
repeated keys and values, slices of packed maps, gates. So it is known of each input channel of a linear layer which
output channel it is of what comes before, in whatever way a network is written. Where a number ends up elsewhere, its
channel cannot be scaled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from qat_lightning.graph.example import Example
from qat_lightning.layers.operators import names_of
from qat_lightning.layers.transformer import written_out
from qat_lightning.modes.eager.observation import function_name, run_apart
from qat_lightning.recipes.channel_numbers import (
    Follower,
    Made,
    Source,
    Where,
    distinct,
    of_last_dim,
    thin,
    where,
)


def _named(*rows: str) -> frozenset[str]:
    return names_of(lambda row: row.name in rows)


_FRESH = frozenset({"zeros_like", "ones_like", "new_zeros", "getattr", "alpha_dropout", "feature_alpha_dropout"})
_MOVES = names_of(lambda row: row.moves) - _FRESH
_SAME = _named("to", "detach", "clone", "contiguous", "dropout")
"""What yields the same values in the same places; so do, for a positive factor, ReLUs."""
_POSITIVE = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_"})
_JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
_PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__"})
_SUMS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
_MIXES = frozenset({"matmul", "__matmul__", "bmm"})
_ATTENTION = frozenset({"scaled_dot_product_attention", "attend"})
_SPREADS = frozenset({"pad", "mean", "sum"})
_NORMS = frozenset({"layer_norm", "rms_norm"})


@dataclass
class _Known:
    """What is known of a tensor in one version of it."""

    version: int
    numbers: Tensor | None
    made_by: str


class Channels(TorchFunctionMode):
    """Everything about channels that one run of a network shows; see `follow_channels`.

    Attributes:
        sources: What makes channels, in the order of the run.
        followers: Linear layers whose input channels are known.
        stuck: Numbers of channels that end up where no factor can be taken out, and where.
        unknown: Linear layers whose input is made by something that no factor can be taken out of, and by what.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.sources: list[Source] = []
        self.followers: list[Follower] = []
        self.stuck: dict[int, str] = {}
        self.unknown: dict[str, str] = {}
        self.count = 0
        self._known = WeakTensorKeyDictionary()
        self._names = WeakTensorKeyDictionary()
        self._uses: Counter[Where] = Counter()
        for name, parameter in network.named_parameters():
            self._names[parameter] = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what the network does, and the same to the numbers."""
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
        if name in _MOVES or name in _SAME:
            self._name_parts(tensors, result)
        else:
            self._count_uses(tensors)
        for tensor, own in before:
            if not any(tensor is one for one in handed_on):
                self._stick(own, name)
        self._note(result, numbers, name, tensors)
        return result

    @staticmethod
    def _handler(name: str) -> Callable[..., Any] | None:
        for names, handle in _HANDLERS:
            if name in names:
                return handle
        return None

    # What is known

    def numbers(self, tensor: Tensor) -> Tensor | None:
        """The number of the channel that each value belongs to, -1 for none; None where nothing is known."""
        known: _Known | None = self._known.get(tensor)
        return known.numbers if known is not None and known.version == tensor._version else None

    def made_by(self, tensor: Tensor) -> str:
        """The function that made a tensor; empty if it is an input."""
        known: _Known | None = self._known.get(tensor)
        return known.made_by if known is not None else ""

    def name_of(self, tensor: Any) -> str | None:
        """The parameter that a tensor is, or is a part of."""
        found: str | None = self._names.get(tensor) if isinstance(tensor, Tensor) else None
        return found

    def used_once(self, tensor: Tensor) -> bool:
        """Whether one function of the network reads a parameter."""
        return self._uses[where(tensor)] == 1

    def new_source(self, name: str, made: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Number the last dimension of what parameters make; the numbers, in the form of a result."""
        count = shape[-1]
        own = torch.arange(self.count, self.count + count, dtype=torch.int32)
        self.sources.append(Source(name, self.count, count, [Made(tensor, own.long()) for tensor in made]))
        self.count += count
        return own.expand(shape)

    def source_of(self, channel: int) -> Source:
        """What makes a channel."""
        return next(s for s in self.sources if s.first <= channel < s.first + s.count)

    def are_stuck(self, numbers: Tensor) -> bool:
        """Whether no factor can be taken out of these channels already."""
        return all(number in self.stuck for number in distinct(numbers))

    def finish(self, result: Any) -> None:
        """Nothing can be taken out of what the network returns, nor of parameters that are read in several places."""
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self.numbers(leaf) is not None:
                self._stick(self.numbers(leaf), "the network's result")
        for source in self.sources:
            if not all(self.used_once(made.tensor) for made in source.made):
                self._stick(torch.arange(source.first, source.first + source.count), "a parameter read elsewhere")
        for follower in list(self.followers):
            if not self.used_once(follower.weight):
                self._stick(follower.channels, "a weight that is read in several places")

    def _stick(self, numbers: Tensor | None, reader: str) -> None:
        if numbers is not None:
            for number in distinct(numbers):
                self.stuck.setdefault(number, reader)

    def _name_parts(self, tensors: list[Tensor], result: Any) -> None:
        """A slice of a parameter is a part of it."""
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
            if own is None and any(leaf is tensor for tensor in tensors) and name in _SAME:
                continue
            # What only moves values is not what stands in the way of a factor.
            moved = (name in _MOVES or name in _SAME) and tensors
            self._known[leaf] = _Known(leaf._version, own, (self.made_by(tensors[0]) or name) if moved else name)


def dict_of(pairs: list[tuple[Tensor, Tensor | None]]) -> dict[int, Tensor]:
    """Numbers by the identity of their tensors."""
    return {id(tensor): numbers for tensor, numbers in pairs if numbers is not None}


Handed = list[Tensor]


def _move(run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """Do the same to the numbers."""
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
    except RuntimeError:  # a view of what is expanded
        args, kwargs = tree_map(_dense, args), tree_map(_dense, kwargs)
        return func(*args, **kwargs)


def _dense(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf


def _keep(run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    if not args or id(args[0]) not in known or not isinstance(result, Tensor) or not result.is_floating_point():
        return None
    on.append(args[0])
    return known[id(args[0])]


def _attend(run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """Each position of what comes out is a mean of values, channel by channel."""
    value = kwargs["value"] if "value" in kwargs else args[2]
    mixed = result[0] if isinstance(result, tuple) else result
    return _mixed(value, mixed, known, on, (None,) if isinstance(result, tuple) else ())


def _mix(run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """Likewise where a network multiplies weights of attention with values itself."""
    return _mixed(args[1], result, known, on, ()) if len(args) > 1 else None


def _mixed(value: Any, mixed: Tensor, known: dict[int, Tensor], on: Handed, more: tuple[Any, ...]) -> Any:
    numbers = known.get(id(value))
    if numbers is None or numbers.dim() < 2 or not bool((numbers == numbers[..., :1, :]).all()):
        return None
    own = numbers[..., :1, :]
    heads = own.shape[-3] if own.dim() > 2 else 1
    if heads not in (1, mixed.shape[-3]):  # enable_gqa: heads that several queries share
        own = own.repeat_interleave(mixed.shape[-3] // heads, -3)
    on.append(value)
    return own.expand(mixed.shape) if not more else (own.expand(mixed.shape), torch.full((1,), -1))


def _multiply(
    run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed
) -> Any:
    """A gate hands on the numbers of one side; a parameter that scales channels makes them."""
    pairs = [(args[0], args[1]), (args[1], args[0])] if len(args) > 1 else []
    for one, _ in pairs:
        if id(one) in known and not run.are_stuck(known[id(one)]):
            on.append(one)
            return known[id(one)].expand(result.shape)
    for scale, other in pairs:
        fits = isinstance(other, Tensor) and run.name_of(scale) is not None and run.name_of(other) is None
        if fits and scale.dim() and scale.shape[-1] == scale.numel() == result.shape[-1]:
            return run.new_source(str(run.name_of(scale)), [scale.flatten()], result.shape)
    return None


def _spread(run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """Zeros around an image, and means over positions, are of the same channels."""
    numbers = known.get(id(args[0])) if args else None
    channels = None if numbers is None else of_last_dim(numbers)
    if channels is None or result.shape[-1:] != channels.shape:
        return None
    on.append(args[0])
    return channels.int().expand(result.shape)


def _add(run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """A parameter that is added to channels is divided like what makes them."""
    for index, one in enumerate(args[:2]):
        other = args[1 - index] if len(args) > 1 else None
        if id(one) not in known or run.name_of(other) is None or not isinstance(other, Tensor):
            continue
        channels = of_last_dim(known[id(one)])
        fits = other.numel() == result.shape[-1] == other.shape[-1] and one.shape == result.shape
        if channels is None or not fits or bool((channels < 0).any()):
            continue
        run.source_of(int(channels[0])).made.append(Made(other.flatten(), channels))
        on.append(one)
        return known[id(one)]
    return None


def _normalize(
    run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed
) -> Any:
    weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
    bias = kwargs.get("bias", args[3] if len(args) > 3 and isinstance(args[3], Tensor) else None)
    made = [part for part in (weight, bias) if part is not None]
    if weight is None or weight.dim() != 1 or any(run.name_of(part) is None for part in made):
        return None
    return run.new_source(str(run.name_of(weight)), made, result.shape)


def _linear(run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    input, weight, bias = given["input"], given["weight"], given.get("bias")
    name = run.name_of(weight)
    if name is None or weight.dim() != 2:
        return None
    numbers = known.get(id(input))
    channels = None if numbers is None else of_last_dim(numbers)
    if channels is None:
        run.unknown[name] = run.made_by(input) or "an input of the network"
    elif bool((channels < 0).any()):
        run.unknown[name] = "a concatenation"
    else:
        largest = input.detach().abs().flatten(0, -2).amax(0) if input.dim() > 1 else input.detach().abs()
        run.followers.append(Follower(name, weight, channels, largest.float()))
        on.append(input)
    made = [part for part in (weight, bias) if part is not None]
    if any(run.name_of(part) is None for part in made):
        return None
    return run.new_source(name, made, result.shape)


_HANDLERS: tuple[tuple[frozenset[str], Callable[..., Any]], ...] = (
    (_SAME | _POSITIVE, _keep),
    (_MOVES | _JOINS, _move),
    (_ATTENTION, _attend),
    (_MIXES, _mix),
    (_SPREADS, _spread),
    (_PRODUCTS, _multiply),
    (_SUMS, _add),
    (_NORMS, _normalize),
    (frozenset({"linear"}), _linear),
)


def follow_channels(network: nn.Module, example: Example) -> Channels:
    """Run ``network`` once, in evaluation, and see where the channels of its linear layers come from.

    Raises:
        Exception: Whatever the network raises on the example.
    """
    run = Channels(network)
    with written_out(network, lambda name: True):
        result = run_apart(network, example, run)
        run.finish(result)
    return run
