"""BatchNorm statistics of the final network: re-estimated over many batches, with fake-quantization enabled.

The statistics of training are averages over weights that were still changing, and with few bits, oscillating weights
keep
changing: Sun et al., 2019, https://papers.nips.cc/paper/2019/hash/65fc9fb4897a89789352e211ca2d398f-Abstract.html, and
Nagel et al., 2022, "Overcoming oscillations in quantization-aware training", https://arxiv.org/abs/2203.11086.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.training_flags import flags_kept
from qat_lightning.layers.batchnorm import has_statistics, is_batchnorm
from qat_lightning.layers.inputs import input_of
from qat_lightning.layers.qat_modules import Counter, FunctionalBatchNorm
from qat_lightning.rehearsal.calibration import call


@dataclass
class _Pool:
    """The values that one BatchNorm received, in float64.

    Attributes:
        running: Its running mean and variance.
        count: Number of values per channel.
        mean: Mean per channel.
        squares: Sum of squared deviations from the mean, per channel.
    """

    running: tuple[Tensor, Tensor]
    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, running: tuple[Tensor, Tensor]) -> _Pool:
        zeros = torch.zeros_like(running[0], dtype=torch.float64)
        return cls(running, zeros.new_zeros(()), zeros, zeros.clone())

    def add(self, values: Tensor) -> None:
        """Add a batch, by the one-pass formula of Chan et al., 1979."""
        channels = values.detach().transpose(0, 1).flatten(1).double()
        count = channels.shape[1]
        if not count:
            return
        variance, mean = torch.var_mean(channels, 1, unbiased=False)
        self._merge(torch.full_like(self.count, count), mean, variance * count)

    def _merge(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.squares = self.squares + squares + delta**2 * self.count * count / total
        self.mean = self.mean + delta * count / total
        self.count = total

    def reduce(self) -> None:
        """Pool the values of all processes; each has to call this."""
        total = self.count.clone()
        dist.all_reduce(total)
        mean = self.mean * self.count / total.clamp(min=1)
        dist.all_reduce(mean)
        squares = self.squares + self.count * (self.mean - mean) ** 2
        dist.all_reduce(squares)
        self.count, self.mean, self.squares = total, mean, squares

    def apply(self) -> bool:
        """Set them as running statistics, with the unbiased variance as in training; False if there were no values."""
        if self.count < 2:
            return False
        self.running[0].copy_(self.mean)
        self.running[1].copy_(self.squares / (self.count - 1))
        return True


class BatchNormStatistics:
    """Pools the values that each BatchNorm of a network receives.

    Args:
        network: A float network, or a prepared one of any mode.

    Raises:
        ConfigurationError: The network has no BatchNorm with running statistics.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm1d(1))
        >>> statistics = BatchNormStatistics(network)
        >>> with statistics.collecting():
        ...     _ = network(torch.tensor([[1.0], [3.0]])), network(torch.tensor([[2.0], [2.0]]))
        >>> statistics.apply()
        >>> network[0].running_mean.item(), round(network[0].running_var.item(), 4)
        (2.0, 0.6667)
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._modules: list[Any] = [module for module in network.modules() if _normalizes(module)]
        if not self._modules:
            raise ConfigurationError(
                f"{type(network).__name__} has no BatchNorm with running statistics to re-estimate."
            )
        self._pools: dict[int, _Pool] = {
            id(module.running_mean): _Pool.empty((module.running_mean, module.running_var))
            for module in self._modules
            if isinstance(module.running_mean, Tensor)
        }

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block, BatchNorm normalizes with the batch's statistics, and does not update its running ones.

        The rest of the network is in evaluation, without gradients.
        """
        handles = [module.register_forward_pre_hook(self._before, with_kwargs=True) for module in self._modules]
        handles += [module.register_forward_hook(self._after) for module in self._modules]
        counts = {
            module: module.num_batches_tracked.clone()
            for module in self._modules
            if module.num_batches_tracked is not None
        }
        frozen = {module: getattr(module, "frozen", None) for module in self._modules}
        try:
            with flags_kept(self.network), torch.no_grad():
                self.network.eval()
                yield
        finally:
            for handle in handles:
                handle.remove()
            for module, was_frozen in frozen.items():
                if was_frozen is not None:
                    module.frozen = was_frozen
            for module, count in counts.items():
                module.num_batches_tracked.copy_(count)

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Before each forward, because the caller may call eval().
        module.training = True
        if hasattr(module, "frozen"):
            module.frozen = False
        mean, variance = _running(module, args)
        module.__dict__["_running_before"] = mean.clone(), variance.clone()
        self._pools.setdefault(id(mean), _Pool.empty((mean, variance))).add(input_of(args, kwargs))

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        # Rounded weights are folded with the running variance, which must not change meanwhile.
        for running, before in zip(_running(module, args), module.__dict__.pop("_running_before"), strict=True):
            running.copy_(before)
        module.training = False

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pooled statistics as running statistics, over all processes of a distributed training."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        for pool in self._pools.values():
            if several:
                pool.reduce()
            pool.apply()


def reestimate_batchnorm(network: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running statistics of every BatchNorm by those of ``batches``.

    Args:
        network: A float network, or a prepared one of any mode; left in evaluation or training as it was.
        batches: Calls of the network, as for `qat_lightning.calibrate`, on its device.

    Returns:
        Number of batches; if it is 0, nothing changes.

    Raises:
        ConfigurationError: There is no BatchNorm with running statistics.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> reestimate_batchnorm(network, [torch.randn(8, 4) for _ in range(3)])
        3
    """
    statistics = BatchNormStatistics(network)
    count = 0
    with statistics.collecting():
        for batch in batches:
            call(network, batch)
            count += 1
    statistics.apply()
    return count


def has_batchnorm(network: nn.Module) -> bool:
    """Whether there is a BatchNorm with running statistics."""
    return any(_normalizes(module) for module in network.modules())


def _normalizes(module: nn.Module) -> bool:
    if isinstance(module, Counter) or getattr(module, "fixed", False):
        return False
    return isinstance(module, FunctionalBatchNorm) or (is_batchnorm(module) and has_statistics(module))


def _running(module: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    if isinstance(module, FunctionalBatchNorm):
        return args[3], args[4]
    return module.running_mean, module.running_var
