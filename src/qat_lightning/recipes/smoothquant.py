"""SmoothQuant: moving outliers of activations into the weights that read them, without changing the network's output.

Xiao et al., 2023, "SmoothQuant: accurate and efficient post-training quantization for large language models",
https://arxiv.org/abs/2211.10438. Each input channel of a linear layer is divided by ``s = max|x|^a / max|w|^(1-a)``,
and its weights are multiplied by it. The producer of the channel absorbs the division: the LayerNorm or RMSNorm before
it, the linear layer of the values of attention, or the linear side of a gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example, running_its_example
from qat_lightning.recipes.channel_numbers import Follower, Source
from qat_lightning.recipes.channels import Channels, follow_channels
from qat_lightning.recipes.same_outputs import named, passing, undone_if_different
from qat_lightning.settings.recipe import check_smoothquant

_LEAST_SHARE = 1e-3
"""Lower limit of a channel's maximum, relative to the largest: a channel inactive in the example may become active."""


@dataclass
class Smoothing:
    """The result of `smooth`.

    Attributes:
        smoothed: Names of the linear layers whose inputs were smoothed, each with the producer that absorbed the
            division.
        left: Names of the other linear layers, each with the reason.
    """

    smoothed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One sentence."""
        text = f"the inputs of {len(self.smoothed)} linear layers were smoothed"
        if self.left:
            text += f"; {len(self.left)} cannot be: {named(self.left)}"
        return text + "."


@torch.no_grad()
def smooth(network: nn.Module, example: Example, alpha: float = 0.5) -> Smoothing:
    """Move the outliers of activations into the weights of the linear layers that read them, in place.

    Where the channels of a layer come from is found by running the example, and whether a factor passes is tested
    numerically. A channel with other readers (a residual addition after a norm, a GELU) is not changed.

    Args:
        network: A trained float network; names and shapes of its parameters do not change.
        example: One call of it, with real data, which determines the largest activations.
        alpha: Migration strength, from 0 (all stays in the activations) to 1 (all goes into the weights).

    Returns:
        The result.

    Raises:
        ConfigurationError: ``alpha`` is invalid.
        NetworkError: The network does not run on the example, or computes different values afterwards; the change is
            undone.

    Example:
        >>> network = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> smooth(network, Example((torch.randn(16, 4),)))
        Smoothing(smoothed={'1': '0'}, left={'3': 'gelu'})
    """
    check_smoothquant(alpha)
    with running_its_example(network):
        channels = follow_channels(network, example)
    sources = _passing(network, example, channels)
    done = _report(channels, {source.first for source in sources})
    with undone_if_different(network, example, by="SmoothQuant", remedy="smoothquant=None"):
        for source in sources:
            _smooth(source, channels, alpha)
    return done


def _smooth(source: Source, channels: Channels, alpha: float) -> None:
    """Apply equation 4 of the paper to the channels of one producer."""
    own = slice(source.first, source.first + source.count)
    activations, weights = torch.zeros(channels.count), torch.zeros(channels.count)
    for follower in _followers(source, channels):
        activations.scatter_reduce_(0, follower.channels, follower.largest, "amax")
        weights.scatter_reduce_(0, follower.channels, follower.weight.abs().amax(0).float(), "amax")
    x, w = activations[own], weights[own]
    free = (x > 0) & (w > 0) & _free(channels)[own]
    x, w = x.clamp(min=float(x.max()) * _LEAST_SHARE), w.clamp(min=float(w.max()) * _LEAST_SHARE)
    factor = torch.ones(channels.count)
    factor[own] = torch.where(free, x**alpha / w ** (1 - alpha), 1.0)
    _scale([source], channels, factor)


def _scale(sources: Iterable[Source], channels: Channels, factor: Tensor) -> None:
    for source in sources:
        for made in source.made:
            made.divide(factor)
    for follower in channels.followers:
        follower.multiply(factor)


def _followers(source: Source, channels: Channels) -> Iterator[Follower]:
    last = source.first + source.count
    for follower in channels.followers:
        if bool(((follower.channels >= source.first) & (follower.channels < last)).any()):
            yield follower


def _free(channels: Channels) -> Tensor:
    """Which channels are read by linear layers only."""
    free = torch.zeros(channels.count, dtype=torch.bool)
    for follower in channels.followers:
        free[follower.channels] = True
    free[list(channels.stuck)] = False
    return free


def _passing(network: nn.Module, example: Example, channels: Channels) -> list[Source]:
    """The producers from which a factor per channel passes."""
    free = _free(channels)
    candidates = [s for s in channels.sources if bool(free[s.first : s.first + s.count].any())]

    def halve_and_double(sources: list[Source]) -> None:
        factor = torch.ones(channels.count)
        for source in sources:
            own = torch.arange(source.first, source.first + source.count)
            factor[own] = torch.where(free[own], 2.0 ** (own % 3 - 1), 1.0)
        _scale(sources, channels, factor)

    kept = passing(network, example, candidates, halve_and_double)
    for source in candidates:
        if source not in kept:
            where = "a factor does not pass to it"
            channels.stuck.update(dict.fromkeys(range(source.first, source.first + source.count), where))
    return kept


def _report(channels: Channels, passing: set[int]) -> Smoothing:
    done, free = Smoothing(), _free(channels)
    for follower in channels.followers:
        name = _layer(follower.name)
        smooth_ones = [n for n in follower.channels.tolist() if free[n] and channels.source_of(n).first in passing]
        if smooth_ones:
            done.smoothed[name] = _layer(channels.source_of(smooth_ones[0]).name)
        else:
            done.left[name] = channels.stuck.get(int(follower.channels[0]), "it stays as it is")
    for name, why in channels.unknown.items():
        done.left.setdefault(_layer(name), why)
    done.left = {name: why for name, why in done.left.items() if name not in done.smoothed}
    return done


def _layer(parameter: str) -> str:
    return parameter.removesuffix(".weight")
