"""Rules for each function of a network and channels that may be rotated: see `qat_lightning.recipes.spaces`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.layers.transformer import written_out
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.recipes.channel_numbers import of_last_dim, thin
from qat_lightning.recipes.numbered_run import (
    ATTENTION,
    MIXES,
    MOVING,
    PRODUCTS,
    SAME,
    SUMS,
    Handed,
    attend,
    keep,
    mix,
)
from qat_lightning.recipes.spaces import MEANS, Read, Spaces

_DIFFERENCES = frozenset({"sub", "subtract", "__sub__", "sub_", "__isub__"})
_QUOTIENTS = frozenset({"div", "divide", "true_divide", "__truediv__", "div_", "__itruediv__"})
_SQUARES = frozenset({"pow", "__pow__", "square"})
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


def _linear(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    return _map(run, given["input"], given["weight"], given.get("bias"), known, result, on, transposed=False)


def _addmm(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """Linear layers as written in GPT-2."""
    if len(args) != 3 or kwargs:
        return None
    return _map(run, args[1], args[2], args[0], known, result, on, transposed=True)


def _mix(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """A product with a weight is a linear layer; any other product may be attention."""
    if len(args) == 2 and run.name_of(args[1]) is not None:
        return _map(run, args[0], args[1], None, known, result, on, transposed=True)
    return _heads(run, mix(run, func, args, kwargs, known, result, on), known, on)


def _attend(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    return _heads(run, attend(run, func, args, kwargs, known, result, on), known, on)


def _heads(run: Spaces, numbers: Any, known: dict[int, Tensor], on: Handed) -> Any:
    """Each head of the values has its own attention weights."""
    for value in on:
        once = thin(known[id(value)])
        run.rows += list(once.reshape(-1, once.shape[-1]).long())
        run.read_plain(once, "attention")
    return numbers


def _map(
    run: Spaces,
    input: Any,
    weight: Any,
    bias: Any,
    known: dict[int, Tensor],
    result: Tensor,
    on: Handed,
    *,
    transposed: bool,
) -> Tensor | None:
    """A linear layer reads channels with one dimension of its weight, and produces channels with the other."""
    name, last = run.name_of(weight), None if id(weight) not in known else of_last_dim(known[id(weight)])
    if name is None or last is None or weight.dim() != 2 or not isinstance(input, Tensor):
        return None
    first = run.first_dim(weight)
    read, made = (first, last) if transposed else (last, first)
    on.append(weight)
    row = run.row(known[id(input)]) if id(input) in known else None
    if row is None:
        run.unknown[name] = run.made_by(input) or "an input of the network"
        run.stick(read, run.unknown[name])
    else:
        on.append(input)
        run.unify(row, read)
        run.reads.append(Read(name, weight.t() if transposed else weight, bias, row))
    _made_with(run, made, bias, known, on)
    return made.int().expand(result.shape)


def _made_with(run: Spaces, made: Tensor, bias: Any, known: dict[int, Tensor], on: Handed) -> None:
    """A bias is rotated along with the weight that produces the channels."""
    if bias is None:
        return
    row = of_last_dim(known[id(bias)]) if id(bias) in known else None
    if row is None or row.numel() != made.numel():
        run.stick(made, "a bias that is computed")
        return
    on.append(bias)
    run.unify(row, made)


def _convolve(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """The output channels can be rotated, such as patches of an image; the input channels cannot."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    weight = given["weight"]
    if run.name_of(weight) is None or given.get("groups", 1) != 1:
        return None
    made = run.first_dim(weight)
    _made_with(run, made, given.get("bias"), known, on)
    return made.reshape(-1, *[1] * (weight.dim() - 2)).expand(result.shape)


def _embed(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    given = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
    weight = given["weight"]
    if run.name_of(weight) is None or id(weight) not in known or given.get("max_norm") is not None:
        return None
    row = of_last_dim(known[id(weight)])
    on.append(weight)
    return None if row is None else row.int().expand(result.shape)


def _add(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """The channels of both sides become equal."""
    if len(args) < 2 or id(args[0]) not in known or id(args[1]) not in known:
        return None
    if args[0].shape[-1:] != args[1].shape[-1:]:
        return None
    left, right = (known[id(part)].expand(result.shape) for part in args[:2])
    run.unify(left, right)
    for numbers in (left, right):
        run.read_plain(numbers, "a residual addition")
    on += args[:2]
    return left


def _multiply(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """Multiplication by one factor for all channels, by a parameter per channel, or by itself."""
    if len(args) < 2:
        return None
    if args[0] is args[1]:
        return _square(run, func, (args[0], 2), {}, known, result, on)
    for one, factor in ((args[0], args[1]), (args[1], args[0])):
        if id(one) not in known or run.name_of(one) is not None or one.shape != result.shape:
            continue
        if _is_single(factor, known):
            return _times_one(run, one, known, on)
        name = run.name_of(factor)
        if name is None or not factor.dim() or factor.shape[-1] != factor.numel() or factor.numel() != one.shape[-1]:
            continue
        row = run.row(known[id(one)])
        if row is not None:
            run.read_plain(row, "a scale")
            on += [one, factor]
            return run.scale(name, row, (factor.flatten(), None), False).expand(result.shape)
    return None


def _divide(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    if len(args) != 2 or kwargs or id(args[0]) not in known or not _is_single(args[1], known):
        return None
    return _times_one(run, args[0], known, on) if args[0].shape == result.shape else None


def _is_single(factor: Any, known: dict[int, Tensor]) -> bool:
    """Whether a factor is the same for all channels of a position."""
    if not isinstance(factor, Tensor):
        return isinstance(factor, (int, float))
    return id(factor) not in known and (not factor.dim() or factor.shape[-1] == 1)


def _times_one(run: Spaces, one: Tensor, known: dict[int, Tensor], on: Handed) -> Tensor | None:
    if one.shape[-1:] == (1,):
        return None
    on.append(one)
    run.read_plain(known[id(one)], "a product")
    return known[id(one)]


def _square(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """Squares: their mean over all channels is invariant under rotation, as in a hand-written norm."""
    two = args[1] if len(args) > 1 else kwargs.get("exponent", 2)
    if not args or id(args[0]) not in known or not isinstance(two, (int, float)) or two != 2:
        return None
    on.append(args[0])
    run.read_plain(known[id(args[0])], "a square")
    run.squares[result] = known[id(args[0])]
    return None


def _mean(run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed) -> Any:
    """Means of squares over channels, or of channels over positions."""
    given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    input, dims = given.get("input"), given.get("dim")
    if not isinstance(input, Tensor):
        return None
    dims = [dims] if isinstance(dims, int) else list(dims or range(input.dim()))
    last = [dim % input.dim() == input.dim() - 1 for dim in dims]
    if input in run.squares:
        numbers = run.squares[input]
        row = run.row(numbers) if last == [True] else None
        if row is None:
            run.stick(numbers, func.__name__)
        else:
            run.rows.append(row)
        return None
    if id(input) not in known or any(last) or not result.is_floating_point():
        return None
    if func.__name__ == "sum":
        run.read_plain(known[id(input)], "a sum")
    row = run.row(known[id(input)])
    if row is None:
        return None
    on.append(input)
    return row.int().expand(result.shape)


def _normalize(
    run: Spaces, func: Any, args: Any, kwargs: Any, known: dict[int, Tensor], result: Any, on: Handed
) -> Any:
    centred = func.__name__ == "layer_norm"
    names = ("input", "normalized_shape", "weight", *(("bias",) if centred else ()))
    given = dict(zip(names, args, strict=False)) | kwargs
    input, weight, bias = given["input"], given.get("weight"), given.get("bias")
    parts = [part for part in (weight, bias) if part is not None]
    if id(input) not in known or len(given["normalized_shape"]) != 1 or any(run.name_of(p) is None for p in parts):
        return None
    row = run.row(known[id(input)])
    if row is None:
        return None
    run.read_plain(row, "a norm")
    on += [input, *parts]
    name = func.__name__ if weight is None else str(run.name_of(weight))
    return run.scale(name, row, (weight, bias), centred).expand(result.shape)


Spaces.handlers = (
    (SAME, keep),
    (ATTENTION, _attend),
    (MIXES, _mix),
    *MOVING,
    (frozenset({"linear"}), _linear),
    (frozenset({"addmm"}), _addmm),
    (_CONVOLUTIONS, _convolve),
    (frozenset({"embedding"}), _embed),
    (frozenset({"layer_norm", "rms_norm"}), _normalize),
    (SUMS | _DIFFERENCES, _add),
    (PRODUCTS, _multiply),
    (_QUOTIENTS, _divide),
    (_SQUARES, _square),
    (MEANS, _mean),
)


def follow_spaces(network: nn.Module, example: Example) -> Spaces:
    """Run ``network`` once, in evaluation, and find which of its channels are equal, and their readers.

    Raises:
        Exception: Whatever the network raises on the example.
    """
    run = Spaces(network)
    with written_out(network, lambda name: True):
        run.finish(run_apart(network, example, run))
    return run
