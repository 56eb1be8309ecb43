"""One real call of a network, passed by a user or caught from the data, and its checks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.errors import NetworkError
from qat_lightning.graph.generators import python_and_numpy_kept
from qat_lightning.graph.pruning import pruned_tensors
from qat_lightning.graph.structures import look_into

MAX_BATCH = 32
"""Number of samples that are kept of a batch: enough to verify with, and small in memory."""

ENOUGH = 8
"""Number of samples that are kept in any case, however large they are."""

MAX_VALUES = 2**20
"""Number of values of an input, beyond which fewer than `MAX_BATCH` samples are kept: large images take long."""


@dataclass(frozen=True)
class Example:
    """One real call of the network, used to trace, prepare and verify it.

    Attributes:
        args: Positional inputs, tensors on the CPU; with a batch dimension of 2 or more where the network permits it.
        kwargs: Keyword inputs.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def example_of(call: Any) -> Example:
    """A call as an `Example`.

    Args:
        call: An `Example`; a tuple or list of positional inputs; a mapping of keyword inputs; or the only input.

    Example:
        >>> example_of({"x": 1}), example_of((1, 2)), example_of(1)
        (Example(args=(), kwargs={'x': 1}), Example(args=(1, 2), kwargs={}), Example(args=(1,), kwargs={}))
    """
    if isinstance(call, Example):
        return call
    if isinstance(call, Mapping):
        return Example((), dict(call))
    return Example(tuple(call) if isinstance(call, (tuple, list)) else (call,), {})


def samples_kept(values: int) -> int:
    """The number of samples that are kept of a larger batch.

    Args:
        values: Number of values of one sample in the largest input.

    Example:
        >>> samples_kept(3 * 32 * 32), samples_kept(3 * 224 * 224), samples_kept(3 * 1024 * 1024)
        (32, 8, 8)
        >>> samples_kept(3 * 160 * 160)
        13
    """
    return max(ENOUGH, min(MAX_BATCH, MAX_VALUES // max(1, values)))


def apart(example: Example) -> Example:
    """The same call with tensors of its own, one for each input.

    Export takes a tensor given twice for a single input, and a forward may change its inputs in place.

    Example:
        >>> x = torch.ones(2)
        >>> one, other = apart(Example((x, x))).args
        >>> one is other, torch.equal(one, other)
        (False, True)
    """

    def own(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return Example(tree_map(own, example.args), tree_map(own, example.kwargs))


def call_apart(network: nn.Module, example: Example) -> Any:
    """The outputs of a network, which may change its inputs in place, for a call that other networks get as well.

    Example:
        >>> example = Example((torch.tensor([-1.0, 1.0]),))
        >>> call_apart(nn.ReLU(inplace=True), example), example.args[0]
        (tensor([0., 1.]), tensor([-1.,  1.]))
    """
    own = apart(example)
    return network(*own.args, **own.kwargs)


def in_float32(example: Example) -> Example:
    """The example with all floating tensors in float32.

    Example:
        >>> in_float32(Example((torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64)))).args
        (tensor([1., 1.]), tensor([1, 1]))
    """

    def cast(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return Example(tree_map(cast, example.args), tree_map(cast, example.kwargs))


def from_user(example_inputs: Any) -> Example:
    """Create an example from ``example_inputs=``, in the forms of `example_of`; see `whole_call`.

    Raises:
        NetworkError: It has none of these forms, or contains no tensor, or one without values.
    """
    by_keyword = isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs)
    is_one = isinstance(example_inputs, Mapping) and not by_keyword
    example = Example((example_inputs,), {}) if is_one else example_of(example_inputs)
    look_into(example.args, example.kwargs)
    tensors = [leaf for leaf in tree_leaves((example.args, example.kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        raise NetworkError(
            f"example_inputs holds no tensor (it is a {type(example_inputs).__name__}): give one tensor, a tuple of "
            "the positional inputs, or a dict of the keyword inputs of the network's forward."
        )
    empty = not any(tensor.numel() for tensor in tensors)
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_meta or empty:
            raise NetworkError(
                f"example_inputs holds {describe(tensor)}, on which a network cannot be prepared: give dense tensors "
                "with values, of two samples or more."
            )
    return whole_call(example)


def examples_from_user(example_inputs: Any, names: list[str]) -> dict[str, Example]:
    """The example of each network: for a single network as passed, for several from a mapping by their names.

    Raises:
        NetworkError: An example contains no tensor, or the names do not match.
    """
    if len(names) == 1:
        return {names[0]: from_user(example_inputs)}
    if not isinstance(example_inputs, Mapping) or set(example_inputs) != set(names):
        given = list(example_inputs) if isinstance(example_inputs, Mapping) else f"a {type(example_inputs).__name__}"
        raise NetworkError(
            f"example_inputs is {given}: for several networks give a dict of each one's example, with the keys "
            f"{', '.join(map(repr, names))}."
        )
    return {name: from_user(example_inputs[name]) for name in names}


def whole_call(example: Example) -> Example:
    """The call with detached copies on the CPU, floating-point tensors in float32."""
    look_into(example.args, example.kwargs)

    def tidy(leaf: Any) -> Any:
        return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf

    return in_float32(Example(tree_map(tidy, example.args), tree_map(tidy, example.kwargs)))


def few_samples(network: nn.Module, call: Example) -> Example:
    """`few_of` a call, or the whole call if the network does not run on a part of it.

    Args:
        network: The float network; a copy of it is called.
        call: One call, see `whole_call`.

    Example:
        >>> few_samples(nn.Linear(3, 3), Example((torch.ones(100, 3),))).args[0].shape
        torch.Size([32, 3])
        >>> few_samples(nn.Unflatten(0, (50, 2)), Example((torch.ones(100, 3),))).args[0].shape
        torch.Size([100, 3])
    """
    return part_that_runs(network, few_of(call), call)


def few_of(call: Example) -> Example:
    """The call with `samples_kept`, spread over the batch, and at least 2 (a batch of 1 is doubled).

    Which dimension is the batch is guessed from the shapes.
    """
    tensors = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    counts = Counter(tensor.shape[0] for tensor in tensors)
    batch = _batch(tensors, counts)
    kept = samples_kept(max((tensor[:1].numel() for tensor in tensors if tensor.shape[0] == batch), default=1))
    if batch == 1 and len(counts) == 1:
        rows = [0, 0]
    elif batch > max(1, kept):
        rows = [index * batch // kept for index in range(kept)]
    else:
        return call

    def few(leaf: Any) -> Any:
        return leaf[rows] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else leaf

    return Example(tree_map(few, call.args), tree_map(few, call.kwargs))


def part_that_runs(network: nn.Module, part: Example, call: Example) -> Example:
    """A part of a call if the network runs on it, otherwise the call.

    Inputs may be indices into others, as the edges of a graph are into its nodes, so that not every part is a call.

    Args:
        network: A copy of it is called, on the CPU.
        part: The call with fewer or other samples; the call itself is not tried.
        call: The whole call.
    """
    return part if part is call or _failure(copy.deepcopy(network).cpu().float(), part) is None else call


@torch.no_grad()
def _failure(network: nn.Module, example: Example) -> Exception | None:
    """The exception with which a call ends, if it does; random states are restored."""
    try:
        with python_and_numpy_kept(), torch.random.fork_rng(devices=[]):
            network(*copy.deepcopy(example.args), **copy.deepcopy(example.kwargs))
    except Exception as error:  # noqa: BLE001 - a network may raise anything
        return error
    return None


def check_example(network: nn.Module, example: Example, *, name: str, given: bool) -> None:
    """Call a copy of the float network with its example, before anything is changed.

    Args:
        network: The float network.
        example: One call of it.
        name: Its name in the LightningModule.
        given: Whether the user passed the example; otherwise it was caught from the data.

    Raises:
        NetworkError: The call fails; the message has the reason and the shapes.
    """
    error = _failure(copy.deepcopy(network), example)
    if error is not None:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        source = "example_inputs" if given else "a batch of the data"
        raise NetworkError(
            f"{name!r} ({type(network).__name__}) fails when it is called with {source}, "
            f"{describe((example.args, example.kwargs))} ({reason}). "
            + ("Give" if given else "If training calls it differently, give")
            + " example_inputs=<a tensor, a tuple of the positional inputs, or a dict of the keyword inputs of its "
            "forward>."
        ) from error


def refuse_old_norms(network: nn.Module, name: str) -> None:
    """Refuse hooks that compute a weight before each call: such a weight is not a parameter and cannot be copied.

    Args:
        network: The float network.
        name: Its name in the LightningModule.

    Raises:
        NetworkError: There are such hooks; the message names the layers, and what to use instead.
    """
    layers = {
        layer: "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
        for layer, module in network.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, (WeightNorm, SpectralNorm))
    }
    pruned = sorted({f"{layer!r}" for layer, *_ in pruned_tensors(network)})
    if pruned:
        raise NetworkError(
            f"{name!r} ({type(network).__name__}) is pruned by torch.nn.utils.prune: hooks compute the weights of "
            f"{', '.join(pruned)}, which cannot be copied or quantized. Call prune.remove(layer, 'weight') for each "
            "before the fit. For masks to hold in training, prune in on_fit_start, in mode='eager' or 'fx'."
        )
    if layers:
        where = ", ".join(f"{function} on {layer!r}" for layer, function in layers.items())
        instead = " and ".join(f"torch.nn.utils.parametrizations.{function}" for function in sorted({*layers.values()}))
        raise NetworkError(
            f"{name!r} ({type(network).__name__}) has hooks of torch.nn.utils ({where}), whose weight is not a "
            f"parameter and cannot be copied or quantized. Use {instead} instead, with the same arguments."
        )


def describe(value: Any) -> str:
    """Describe inputs in words: types, shapes and dtypes, without values.

    Example:
        >>> describe((torch.zeros(2, 3), {"scale": 1.0}))
        '(float32 tensor [2, 3], {scale: float})'
    """
    if isinstance(value, Tensor):
        layout = "meta " if value.is_meta else "" if value.layout == torch.strided else "sparse "
        return f"{layout}{str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(describe, value)) + ")"
    return type(value).__name__


def _batch(tensors: list[Tensor], sizes: Counter[int]) -> int:
    """The batch size: the first dimension of the first tensor, if that of most tensors is the same.

    It is -1 if it is not, so that nothing is cut: two matrices beside the images of a batch may agree as well.
    """
    first = sizes.most_common(2)
    most = bool(first) and (len(first) == 1 or first[0][1] > first[1][1])
    return first[0][0] if most and tensors[0].shape[0] == first[0][0] else -1


@contextmanager
def running_its_example(network: nn.Module) -> Iterator[None]:
    """Within the block a network is called with its example; an error there is raised as one about both.

    Raises:
        NetworkError: An exception was raised.
    """
    try:
        yield
    except Exception as error:
        raise NetworkError(
            f"{type(network).__name__} does not run on its example inputs: {type(error).__name__}: {error}. Give "
            "example_inputs= that its forward accepts."
        ) from error
