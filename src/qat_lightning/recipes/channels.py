"""Finding where the channels of linear layers come from, by one run of a network in which each channel has a number.

Producers of channels (a linear layer, a LayerNorm, a multiplied scale) number them. Ops that only move values, or are
linear in them, pass the numbers on in the same way: reshaping, heads of attention, repeated keys and values, slices of
packed projections, gates. So for each input channel of a linear layer it is known which output channel of an earlier
layer it is, however the network is written. A channel whose number reaches any other op cannot be scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.layers.transformer import written_out
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.recipes.channel_numbers import Follower, Made, Source, distinct, of_last_dim
from qat_lightning.recipes.numbered_run import (
    MOVING,
    PRODUCTS,
    SAME,
    SUMS,
    Handed,
    Handler,
    NumberedRun,
    keep,
)

_POSITIVE = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_"})
"""Ops that commute with a positive factor."""
_SPREADS = frozenset({"pad", "mean", "sum"})
_NORMS = frozenset({"layer_norm", "rms_norm"})


class Channels(NumberedRun):
    """The channels of one run of a network; see `follow_channels`.

    Attributes:
        sources: Producers of channels, in execution order.
        followers: Linear layers whose input channels are known.
        stuck: Numbers of channels with a reader that does not commute with a factor, and that reader.
        unknown: Linear layers whose input has a producer that cannot be divided, and that producer.
    """

    handlers: ClassVar[tuple[tuple[frozenset[str], Handler], ...]]

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.sources: list[Source] = []
        self.followers: list[Follower] = []
        self.unknown: dict[str, str] = {}

    def new_source(self, name: str, made: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Number the last dimension of the output of some parameters; returns numbers in the shape of the output."""
        count = shape[-1]
        own = self.new_numbers(count)
        self.sources.append(Source(name, int(own[0]), count, [Made(tensor, own.long()) for tensor in made]))
        return own.expand(shape)

    def source_of(self, channel: int) -> Source:
        """The producer of a channel."""
        return next(s for s in self.sources if s.first <= channel < s.first + s.count)

    def are_stuck(self, numbers: Tensor) -> bool:
        """Whether these channels are known not to be scalable."""
        return all(number in self.stuck for number in distinct(numbers))

    def finish(self, result: Any) -> None:
        """Mark outputs of the network, and parameters with several readers, as not scalable."""
        self.stick_results(result)
        for source in self.sources:
            if not all(self.used_once(made.tensor) for made in source.made):
                self.stick(torch.arange(source.first, source.first + source.count), "a parameter read elsewhere")
        for follower in list(self.followers):
            if not self.used_once(follower.weight):
                self.stick(follower.channels, "a weight that is read in several places")


def _multiply(
    run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed
) -> Any:
    """A gate passes on the numbers of one side; a parameter that scales channels produces them."""
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
    """Zero padding and means over positions keep the channels."""
    numbers = known.get(id(args[0])) if args else None
    channels = None if numbers is None else of_last_dim(numbers)
    if channels is None or result.shape[-1:] != channels.shape:
        return None
    on.append(args[0])
    return channels.int().expand(result.shape)


def _add(run: Channels, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """A parameter that is added to channels is divided along with their producer."""
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


Channels.handlers = (
    (SAME | _POSITIVE, keep),
    *MOVING,
    (_SPREADS, _spread),
    (PRODUCTS, _multiply),
    (SUMS, _add),
    (_NORMS, _normalize),
    (frozenset({"linear"}), _linear),
)


def follow_channels(network: nn.Module, example: Example) -> Channels:
    """Run ``network`` once, in evaluation, and find where the channels of its linear layers come from.

    Raises:
        Exception: Whatever the network raises on the example.
    """
    run = Channels(network)
    with written_out(network, lambda name: True):
        result = run_apart(network, example, run)
        run.finish(result)
    return run
