"""Measurements of an int8 network: size, latency, SQNR and agreement.

The functions take plain modules and tensors. `Agreement` and `SignalToQuantizationNoiseRatio` are the same measures as
`torchmetrics.Metric`, summed up over batches and processes.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves
from torch.utils.benchmark import Timer
from torchmetrics import Metric

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.structures import look_into
from qat_lightning.graph.training_flags import evaluating
from qat_lightning.numerics.sqnr import decibel, dequantized, energies, refuse_other_shape

_WARM_UP_CALLS = 3
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)


def outputs_by_path(result: Any) -> dict[str, Tensor]:
    """The tensors in the result of a network, by their paths.

    Args:
        result: Tensors in any structure.

    Example:
        >>> sorted(outputs_by_path({"logits": torch.zeros(2), "count": 3, "both": [torch.ones(1), torch.zeros(0)]}))
        ["['both'][0]", "['both'][1]", "['logits']"]
    """
    look_into(result)
    leaves, _ = tree_flatten_with_path(result)
    return {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def class_axis(output: Tensor, inputs: Any = (), given: int | None = None) -> int | None:
    """Find the axis of an output that holds one score per class.

    Args:
        output: The output of a network.
        inputs: What the network was called with, in any structure.
        given: The axis, if it is known.

    Returns:
        The last axis of a matrix (rows x classes), and of scores per token: three dimensions, of which the first two
        are those of integers among the inputs. Otherwise axis 1 (N, C, ... as for segmentation). ``None`` if there is
        none: fewer than two dimensions, integers, or fewer than two classes.

    Example:
        >>> class_axis(torch.zeros(8, 10)), class_axis(torch.zeros(8, 21, 32, 32)), class_axis(torch.zeros(8, 1))
        (1, 1, None)
        >>> class_axis(torch.zeros(8, 12, 50), {"input_ids": torch.zeros(8, 12, dtype=torch.long)})
        2
    """
    if output.dim() < 2 or not (output.is_floating_point() or output.is_quantized):
        return None
    axis = given
    if axis is None:
        axis = 2 if output.dim() == 3 and _has_tokens(inputs, output.shape[:2]) else 1
    if not -output.dim() <= axis < output.dim() or output.size(axis) < 2:
        return None
    return axis % output.dim()


def _has_tokens(inputs: Any, shape: torch.Size) -> bool:
    look_into(inputs)
    tensors = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    return any(leaf.shape == shape and leaf.dtype in _WHOLE for leaf in tensors)


def agreement(reference: Tensor, actual: Tensor) -> float:
    """Compute the share of rows for which both outputs choose the same class.

    A row is a sample, or for outputs (N, C, ...) a position of a sample. If several scores are equal, the first class
    counts in both outputs.

    Args:
        reference: Scores with a class axis (see `class_axis`).
        actual: Scores of the same shape.

    Returns:
        The share from 0 to 1, NaN if there is no row.

    Raises:
        ConfigurationError: If the shapes differ or there is no class axis.

    Example:
        >>> agreement(torch.tensor([[0.1, 0.9], [0.6, 0.4]]), torch.tensor([[0.2, 0.8], [0.3, 0.7]]))
        0.5
    """
    same, rows = _same_choices(reference.detach().cpu(), actual.detach().cpu())
    return int(same) / rows if rows else math.nan


class Agreement(Metric):
    """The share of rows for which both outputs choose the same class, over all batches and processes.

    See `agreement`.

    Example:
        >>> metric = Agreement()
        >>> metric.update(torch.tensor([[0.1, 0.9]]), torch.tensor([[0.2, 0.8]]))
        >>> metric.update(torch.tensor([[0.6, 0.4]]), torch.tensor([[0.3, 0.7]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    same: Tensor
    rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("same", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, reference: Tensor, actual: Tensor) -> None:
        """Add a batch.

        Args:
            reference: Scores with a class axis, on any device.
            actual: Scores of the same shape, on any device.

        Raises:
            ConfigurationError: If the shapes differ or there is no class axis.
        """
        same, rows = _same_choices(reference.detach().to(self.device), actual.detach().to(self.device))
        self.same += same
        self.rows += rows

    def compute(self) -> Tensor:
        """Compute the share from 0 to 1, NaN before the first row."""
        return self.same / self.rows


class SignalToQuantizationNoiseRatio(Metric):
    """The signal-to-quantization-noise ratio in dB over all batches and processes.

    Energies are summed in float64 and divided at the end: the result is `sqnr_db` of all batches put together, not the
    mean of the batches' ratios.

    Example:
        >>> metric = SignalToQuantizationNoiseRatio()
        >>> metric.update(torch.tensor([10.0]), torch.tensor([10.0]))
        >>> metric.update(torch.tensor([0.0]), torch.tensor([1.0]))
        >>> metric.compute()
        tensor(20., dtype=torch.float64)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    signal: Tensor
    noise: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("signal", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("noise", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reference: Tensor, actual: Tensor) -> None:
        """Add a batch.

        Args:
            reference: The expected output, on any device.
            actual: The actual output, of the same shape, on any device.

        Raises:
            ConfigurationError: If the shapes differ.
        """
        signal, noise = energies(reference.detach().to(self.device), actual.detach().to(self.device))
        self.signal += signal
        self.noise += noise

    def compute(self) -> Tensor:
        """Compute the ratio in dB, infinity if there was no difference."""
        return decibel(self.signal, self.noise)


def size_mb(module: nn.Module) -> float:
    """Measure the file size of a module's weights.

    Args:
        module: Any module; packed int8 weights count as they are saved.

    Returns:
        The size of ``torch.save(module.state_dict())`` in MB, of 1,000,000 bytes.

    Example:
        >>> 4.0 < size_mb(nn.Linear(1000, 1000)) < 4.01
        True
    """
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell() / 1e6


@dataclass(frozen=True)
class Latency:
    """The time of one call of a module.

    Args:
        median_ms: The median over the blocks of timed calls, in milliseconds.
        iqr_ms: The interquartile range over the blocks.
        runs: Total number of timed calls.
    """

    median_ms: float
    iqr_ms: float
    runs: int

    @property
    def spread(self) -> float:
        """The interquartile range relative to the median, which shows the influence of other load on the machine."""
        return self.iqr_ms / self.median_ms


def latency_ms(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, min_run_time: float = 0.5
) -> Latency:
    """Measure how long one call of a module takes, in evaluation and inference mode.

    Each submodule's ``training`` flag is restored afterwards. Uses torch's current number of threads.

    Args:
        module: The module.
        args: Its positional arguments, as a tuple: ``(x,)``.
        kwargs: Its keyword arguments.
        min_run_time: Minimum measuring time in seconds, after a warm-up.

    Returns:
        The median time of a call, its spread and the number of calls.

    Raises:
        ConfigurationError: If ``args`` is neither a tuple nor a list.

    Example:
        >>> latency_ms(nn.Linear(4, 4), (torch.zeros(1, 4),), min_run_time=0.01).median_ms > 0
        True
    """
    timer = _timer(module, args, kwargs)
    with _evaluating(module):
        _warm_up(timer)
        measurement = timer.blocked_autorange(min_run_time=min_run_time)
    runs = measurement.number_per_run * len(measurement.raw_times)
    return Latency(median_ms=measurement.median * 1e3, iqr_ms=measurement.iqr * 1e3, runs=runs)


def latency_interleaved(
    modules: Mapping[str, nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    rounds: int = 15,
    *,
    block_time: float = 0.02,
) -> dict[str, Latency]:
    """Measure several modules in turn, so that their ratios are fair even if the machine has other load.

    Each round times a block of calls of every module, one module after another, every second round in reverse order. A
    temporary slowdown of the machine then affects all of them, and the medians over the rounds leave it out.

    Args:
        modules: The modules by name.
        args: The positional arguments of all of them, as a tuple: ``(x,)``.
        kwargs: Their keyword arguments.
        rounds: Number of rounds.
        block_time: Approximate duration of a block of calls in seconds; a block is at least one call.

    Returns:
        The latency of each module by name, in the order given.

    Raises:
        ConfigurationError: If ``args`` is neither a tuple nor a list, or ``rounds`` is less than 1.

    Example:
        >>> sorted(latency_interleaved({"a": nn.ReLU(), "b": nn.Tanh()}, (torch.zeros(4),), rounds=3, block_time=0.001))
        ['a', 'b']
    """
    if rounds < 1:
        raise ConfigurationError(f"rounds={rounds} is not valid: give 1 or more rounds, for example 15.")
    timers = {name: _timer(module, args, kwargs) for name, module in modules.items()}
    times: dict[str, list[float]] = {name: [] for name in modules}
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(_evaluating(module))
        calls = {}
        for name, timer in timers.items():
            _warm_up(timer)
            calls[name] = max(1, round(block_time / max(timer.timeit(1).median, 1e-9)))
        for number in range(rounds):
            for name in list(timers) if number % 2 == 0 else reversed(timers):
                times[name].append(timers[name].timeit(calls[name]).median * 1e3)
    return {
        name: Latency(median_ms=statistics.median(seen), iqr_ms=_interquartile_range(seen), runs=rounds * calls[name])
        for name, seen in times.items()
    }


def _same_choices(reference: Tensor, actual: Tensor) -> tuple[Tensor, int]:
    refuse_other_shape(reference, actual)
    axis = class_axis(reference)
    if axis is None:
        raise ConfigurationError(
            f"an output of shape {tuple(reference.shape)} and type {reference.dtype} has no class axis. Agreement "
            "needs float scores of shape (rows, classes) or (N, classes, ...) with two classes or more; for other "
            "outputs use sqnr_db or SignalToQuantizationNoiseRatio."
        )
    same = dequantized(reference).argmax(axis) == dequantized(actual).argmax(axis)
    return same.sum(), same.numel()


def _timer(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Timer:
    if not isinstance(args, (tuple, list)):
        # a bare tensor would be unpacked along its first axis
        raise ConfigurationError(f"args is a {type(args).__name__} and must be a tuple: write (x,) for one input x.")
    return Timer(
        "module(*args, **kwargs)",
        globals={"module": module, "args": tuple(args), "kwargs": dict(kwargs or {})},
        num_threads=torch.get_num_threads(),
    )


def _warm_up(timer: Timer) -> None:
    timer.timeit(_WARM_UP_CALLS)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    with evaluating(module), torch.inference_mode():
        yield


def _interquartile_range(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return upper - lower
