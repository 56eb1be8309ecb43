"""BatchNorm statistics of recent batches only, and how far they are from the running statistics.

A running average of momentum 0.1 still contains 8 % of its initial value after 24 batches, 0.5 % after 50. If frozen
earlier, it describes no network that ever ran. Recomputing it over some batches is "precise BatchNorm" (Wu and Johnson,
2021, "Rethinking 'Batch' in BatchNorm", https://arxiv.org/abs/2105.07576). Here nothing is recomputed: from the running
average at two moments follows the average of the batches in between,

    now = kept x then + (1 - kept) x between,

where ``kept`` is the share of the older value that is left after the updates in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.layers.batchnorm import is_batchnorm
from qat_lightning.layers.inputs import input_of
from qat_lightning.layers.qat_modules import Counter, FreezableBatchNorm, FunctionalBatchNorm

SETTLED = 0.1
"""Running statistics within this share of a standard deviation of the recent batches' are not changed."""

_SHORTEST, _LONGEST = 8, 64

Snapshot = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Running mean, running variance and number of updates, by the name of the BatchNorm."""


@dataclass(frozen=True)
class Difference:
    """The distance between two sets of statistics of a BatchNorm.

    Attributes:
        name: Name of the layer.
        deviations: Mean over the channels, in standard deviations.
        samples: Number of values per channel in the newer statistics; 0 if unknown.
    """

    name: str
    deviations: float
    samples: int = 0

    def __str__(self) -> str:
        return f"{self.name!r} by {self.deviations:.2f}"


def freezable(network: nn.Module) -> dict[str, Any]:
    """The modules that hold the running statistics which a freeze stops, by name.

    Args:
        network: A prepared network of any mode.
    """
    return {name: module for name, module in network.named_modules() if _holds_statistics(module)}


def window_length(network: nn.Module) -> int:
    """Number of batches that count as recent: the length of a running average's memory, from 8 to 64.

    Fewer would be noisier than the statistics they replace.
    """
    momenta = [module.momentum for module in freezable(network).values()]
    slowest = min((0.0 if momentum is None else momentum for momentum in momenta), default=1.0)
    return _LONGEST if slowest <= 1 / _LONGEST else max(_SHORTEST, math.ceil(1 / slowest))


def snapshot(network: nn.Module) -> Snapshot:
    """The current running statistics."""
    return {
        name: (module.running_mean.clone(), module.running_var.clone(), module.num_batches_tracked.clone())
        for name, module in freezable(network).items()
    }


@torch.no_grad()
def settle(network: nn.Module, then: Snapshot) -> list[Difference]:
    """Set the statistics of BatchNorms that have not settled to those of the batches since ``then``.

    Args:
        network: A prepared network of any mode.
        then: Its statistics some batches ago, from `snapshot`.

    Returns:
        The layers that were changed, and by how much; the others are bit-equal to before.

    Example:
        >>> network = nn.Sequential(FreezableBatchNorm(2))
        >>> network[0]._check_input_dim = lambda input: None
        >>> before = snapshot(network)
        >>> for _ in range(3):
        ...     _ = network(torch.tensor([[4.0, 0.0], [6.0, 0.2]]))
        >>> [str(difference) for difference in settle(network, before)]
        ["'0' by 2.20"]
        >>> network[0].running_mean
        tensor([5.0000, 0.1000])
    """
    changed = []
    for name, module in freezable(network).items():
        if name not in then:
            continue
        recent = _since(module, *(value.to(module.running_mean.device) for value in then[name]))
        if recent is None:
            continue
        deviations = _deviations((module.running_mean, module.running_var), recent, module.eps)
        if deviations > SETTLED:
            changed.append(Difference(name, deviations))
            module.running_mean.copy_(recent[0])
            module.running_var.copy_(recent[1])
    return changed


@contextmanager
def measuring(network: nn.Module, found: dict[str, Difference]) -> Iterator[None]:
    """Within the block, compare the inputs of each BatchNorm with its running statistics.

    Args:
        network: A prepared network of any mode.
        found: Filled with the first comparison of each layer.
    """

    def compare(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = args[3:5] if isinstance(module, FunctionalBatchNorm) else (module.running_mean, module.running_var)
        values = input_of(args, kwargs).detach().transpose(0, 1).flatten(1).double()
        if name in found or running[0] is None or values.shape[1] < 2:
            return
        variance, mean = torch.var_mean(values, 1)
        found[name] = Difference(name, _deviations(running, (mean, variance), module.eps), values.shape[1])

    handles = [
        module.register_forward_pre_hook(partial(compare, name), with_kwargs=True)
        for name, module in network.named_modules()
        if isinstance(module, FreezableBatchNorm) and not isinstance(module, Counter)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def differs(difference: Difference) -> bool:
    """Whether one batch shows that statistics are wrong: by more than its own noise, and three times `SETTLED`."""
    return difference.deviations > 3 * SETTLED + 1.5 / math.sqrt(max(1, difference.samples))


def _holds_statistics(module: Any) -> bool:
    if not is_batchnorm(module) or module.running_mean is None or module.num_batches_tracked is None:
        return False
    return isinstance(module, FreezableBatchNorm) or any(isinstance(m, FunctionalBatchNorm) for m in module.children())


def _since(module: Any, mean: Tensor, variance: Tensor, count: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of the values averaged since a snapshot; None if there are none."""
    updates = int(module.num_batches_tracked - count)
    if updates < 1:
        return None
    kept = int(count) / int(module.num_batches_tracked) if module.momentum is None else (1 - module.momentum) ** updates
    if kept == 1:
        return None

    def between(now: Tensor, before: Tensor) -> Tensor:
        return (now.double() - kept * before.double()) / (1 - kept)

    return between(module.running_mean, mean), between(module.running_var, variance).clamp(min=0)


def _deviations(ours: Any, theirs: Any, eps: float) -> float:
    """Shift of the mean in standard deviations and log ratio of the deviations, combined; averaged over channels."""
    (mean, variance), (other_mean, other_variance) = ((a.double(), b.double()) for a, b in (ours, theirs))
    # Relative to the larger of the two, because a dead channel has no deviation.
    shift = (mean - other_mean) / (torch.maximum(variance, other_variance) + eps).sqrt()
    spread = ((variance + eps) / (other_variance + eps)).log() / 2
    return float(torch.hypot(shift, spread).mean())


def as_plain(taken: Mapping[str, Snapshot]) -> dict[str, dict[str, list[Tensor]]]:
    """Snapshots of several networks in the form of a checkpoint: copies on the CPU."""
    return {
        network: {name: [value.cpu().clone() for value in values] for name, values in statistics.items()}
        for network, statistics in taken.items()
    }
