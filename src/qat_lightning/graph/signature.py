"""How a captured network is called: flattening arguments to the graph's inputs, and rebuilding its outputs."""

from __future__ import annotations

import inspect
import operator
import reprlib
from collections import OrderedDict
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.graph.structures import look_into, same

BATCH = -1
"""Placeholder in a shape for the batch dimension, which may have any size."""


@dataclass(frozen=True)
class Input:
    """One leaf of the arguments: a tensor, or a value that is fixed by the capture.

    Attributes:
        path: Its place in the arguments, as a Python expression.
        shape: The shape of a tensor, with `BATCH` for dimensions that may vary; None for a plain value.
        value: The value, if it is not a tensor.
        dtype: The dtype of a tensor.
    """

    path: str
    shape: tuple[int, ...] | None
    value: Any = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class CallSpec:
    """The signature of a captured network, with the structure of its inputs and outputs.

    Attributes:
        name: The network's class, for messages.
        signature: Signature of its ``forward``, kept without annotations, which need not pickle.
        in_spec: Structure of ``(args, kwargs)`` as returned by `canonical`.
        inputs: The leaves of that structure.
        out_spec: Structure of the result.
        batch: Batch size of the capture.
    """

    name: str
    signature: inspect.Signature
    in_spec: pytree.TreeSpec
    inputs: tuple[Input, ...]
    out_spec: pytree.TreeSpec
    batch: int
    _given: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "signature", without_annotations(self.signature))
        object.__setattr__(self, "_given", given_parameters(self.signature, self.in_spec))

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the order of the graph's inputs, with integers as wide as those captured.

        Raises:
            NetworkError: The call has other arguments, shapes or dtypes than the captured one.
        """
        look_into(args, kwargs)
        try:
            leaves = self._leaves(canonical(self.signature, args, kwargs, self._given))
        except (TypeError, ValueError) as error:
            raise self._other_call(str(error)) from error
        tensors = []
        for leaf, expected in zip(leaves, self.inputs, strict=True):
            if expected.shape is None:
                if isinstance(leaf, Tensor) or leaf != expected.value:
                    _refuse(self.name, expected.path, repr(expected.value), _describe(leaf))
                continue
            if leaf is None:
                raise self._other_call(f"{expected.path} is missing.")
            if not isinstance(leaf, Tensor) or not _fits(leaf, expected.shape):
                _refuse(self.name, expected.path, _shape(expected.shape), _describe(leaf))
            tensor = as_captured(leaf, expected.dtype)
            if tensor is None:
                _refuse_dtype(self.name, expected, leaf)
            tensors.append(tensor)
        return tensors

    def _other_call(self, reason: str) -> NetworkError:
        return NetworkError(
            f"{self.name} was captured with the inputs {self.describe()}, and called with others: {reason} Call it "
            "with the same arguments, give example_inputs= that contain these, or use mode='eager', which needs no "
            "graph."
        )

    def _leaves(self, arguments: Any) -> list[Any]:
        found, spec = pytree.tree_flatten(arguments)
        if spec != self.in_spec:
            # In a loaded file, a user's dataclass is a record of the same fields.
            names = list(self.signature.parameters)
            paths = [_path(path, names) for path, _ in pytree.tree_flatten_with_path(arguments)[0]]
            if list(map(_as_key, paths)) != [_as_key(given.path) for given in self.inputs]:
                found = self.in_spec.flatten_up_to(arguments)
        return found

    def unflatten(self, outputs: Any) -> Any:
        """What ``forward`` returns, from the graph's outputs."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> CallSpec:
        """Itself: it never changes."""
        return self

    def describe(self) -> str:
        """The inputs and their shapes, for messages."""
        return ", ".join(f"{i.path}: {_shape(i.shape) if i.shape is not None else repr(i.value)}" for i in self.inputs)


def canonical(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], given: AbstractSet[str] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalize a call: arguments are positional where that is possible.

    Args:
        signature: The signature of the function.
        args: Positional arguments.
        kwargs: Keyword arguments.
        given: The parameters that another call gives: those that this one omits get their defaults, and others that
            have their defaults are left out.

    Example:
        >>> signature = inspect.signature(lambda x, y=1: None)
        >>> canonical(signature, (), {"y": 3, "x": 2}), canonical(signature, (2, 1), {}, {"x"})
        (((2, 3), {}), ((2,), {}))
    """
    bound = signature.bind(*args, **kwargs)
    if given is not None and bound.arguments.keys() != given:
        for name, parameter in signature.parameters.items():
            if parameter.default is parameter.empty or parameter.default is ...:
                continue  # a file has ... in place of a default that it cannot hold
            if name in given:
                bound.arguments.setdefault(name, parameter.default)
            elif name in bound.arguments and same(parameter.default, bound.arguments[name], operator.is_):
                del bound.arguments[name]
    return bound.args, bound.kwargs


def as_captured(tensor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A tensor for a graph that was captured with a dtype: a graph has conversions between dtypes built in.

    Args:
        tensor: An input of a call.
        dtype: The dtype of the captured one; None if it is unknown.

    Returns:
        Booleans and integers converted to integers that hold them all; floating-point numbers as they are if
        floating-point ones were captured, because mixed precision changes their dtype; None for any other dtype.

    Example:
        >>> import torch
        >>> ids = torch.zeros(2, dtype=torch.int32)
        >>> as_captured(ids, torch.int64).dtype, as_captured(ids, torch.float32)
        (torch.int64, None)
    """
    if dtype is None or tensor.dtype is dtype or (tensor.is_floating_point() and dtype.is_floating_point):
        return tensor
    if dtype.is_floating_point or dtype.is_complex or torch.promote_types(tensor.dtype, dtype) is not dtype:
        return None
    return tensor.to(dtype)


def given_parameters(signature: inspect.Signature, structure: pytree.TreeSpec) -> frozenset[str]:
    """The parameters that a call gives.

    Args:
        signature: The signature of the function.
        structure: The structure of ``(args, kwargs)``.
    """
    args, kwargs = structure.children()  # not rebuilt: a dataclass may check what it is made of
    return frozenset(signature.bind(*args.children(), **dict.fromkeys(kwargs.context)).arguments)


def without_annotations(signature: inspect.Signature) -> inspect.Signature:
    """A signature with names, kinds and defaults alone."""
    return inspect.Signature([one.replace(annotation=one.empty) for one in signature.parameters.values()])


def batch_size(example: Example) -> int | None:
    """Batch size: the most common first dimension of the tensors of a call, and of several such the first.

    Example:
        >>> import torch
        >>> batch_size(Example((torch.zeros(4, 3), torch.zeros(2), torch.zeros(4))))
        4
    """
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves((example.args, example.kwargs)) if _has_dims(leaf)]
    return max(sizes, key=sizes.count) if sizes else None


def has_batch(leaf: Any, size: int | None) -> bool:
    """Whether the first dimension of ``leaf`` is the batch."""
    return _has_dims(leaf) and leaf.shape[0] == size


def one_sample(example: Example) -> Example:
    """The same call with only the first sample of its batch; inputs without a batch dimension stay.

    Example:
        >>> import torch
        >>> [tuple(tensor.shape) for tensor in one_sample(Example((torch.zeros(4, 3), torch.zeros(2)))).args]
        [(1, 3), (2,)]
    """
    size = batch_size(example)

    def first(leaf: Any) -> Any:
        return leaf[:1].contiguous() if has_batch(leaf, size) else leaf

    args, kwargs = pytree.tree_map(first, (example.args, example.kwargs))
    return Example(args, kwargs)


def samples(example: Example) -> list[Example]:
    """One call for each sample of the batch.

    Example:
        >>> import torch
        >>> [call.args[0].tolist() for call in samples(Example((torch.tensor([1.0, 2.0]),)))]
        [[1.0], [2.0]]
    """
    size = batch_size(example)

    def nth(number: int) -> Example:
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf[number : number + 1].contiguous() if has_batch(leaf, size) else leaf,
            (example.args, example.kwargs),
        )
        return Example(args, kwargs)

    return [nth(number) for number in range(size or 1)]


def inputs_of(network: nn.Module, example: Example, size: int | None) -> tuple[pytree.TreeSpec, tuple[Input, ...]]:
    """Structure and leaves of the arguments of ``example``."""
    arguments = canonical(inspect.signature(network.forward), example.args, example.kwargs)
    paths, spec = pytree.tree_flatten_with_path(arguments)
    names = list(inspect.signature(network.forward).parameters)
    inputs = []
    for path, leaf in paths:
        where = _path(path, names)
        if isinstance(leaf, Tensor):
            shape = tuple(leaf.shape)
            inputs.append(Input(where, (BATCH, *shape[1:]) if has_batch(leaf, size) else shape, dtype=leaf.dtype))
        else:
            inputs.append(Input(where, None, leaf))
    return spec, tuple(inputs)


def _as_key(path: str) -> str:
    """A path by attributes written as one by keys."""
    start, *names = path.split(".")
    return start + "".join(f"[{name!r}]" for name in names)


def _path(path: tuple[Any, ...], names: list[str]) -> str:
    keyword, argument = path[0].idx == 1, path[1]
    if keyword:
        start = str(argument.key)
    else:
        start = names[argument.idx] if argument.idx < len(names) else f"argument {argument.idx}"
    return start + pytree.keystr(path[2:])


def _has_dims(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _fits(leaf: Tensor, shape: tuple[int, ...]) -> bool:
    return leaf.dim() == len(shape) and all(want in (BATCH, have) for want, have in zip(shape, leaf.shape, strict=True))


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join("batch" if size == BATCH else str(size) for size in shape) + ")"


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"a tensor of shape {tuple(leaf.shape)}"
    if isinstance(leaf, (list, tuple, dict)):
        return f"a {type(leaf).__name__} of {len(leaf)}"  # a container may hold tensors with all their values
    return reprlib.repr(leaf)


def _refuse(name: str, path: str, expected: str, got: str) -> None:
    raise NetworkError(
        f"{name} was captured for {path} = {expected} and is called with {got}. PT2 export fixes every dimension "
        "except the batch, and every value that is not a tensor: give example_inputs= like those it is used with, or "
        "use mode='fx' or mode='eager'."
    )


def _refuse_dtype(name: str, expected: Input, leaf: Tensor) -> NoReturn:
    raise NetworkError(
        f"{name} was captured for {expected.path} of {expected.dtype} and is called with {leaf.dtype}. PT2 export "
        "fixes the kind of number: convert it before the call, give example_inputs= like those it is used with, or "
        "use mode='fx' or mode='eager'."
    )


def dynamic_shapes(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], size: int | None
) -> dict[str, Any]:
    """The dimensions of a call that may vary, for `torch.export.export`: the first one, where it is the batch."""
    # AUTO rather than Dim("batch"): a network may compute with the batch size, such as size // 2.
    arguments = signature.bind(*args, **kwargs).arguments
    return {name: _dims(value, size) for name, value in arguments.items()}


def _dims(value: Any, size: int | None) -> Any:
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        return {key: _dims(inner, size) for key, inner in value.items()}
    node_type = pytree._get_node_type(value)
    if node_type not in pytree.SUPPORTED_NODES:
        return {0: torch.export.Dim.AUTO} if has_batch(value, size) else None
    inner, context = pytree.SUPPORTED_NODES[node_type].flatten_fn(value)
    dims = [_dims(part, size) for part in inner]
    # The leaves of a custom container are given as a list.
    return pytree.SUPPORTED_NODES[node_type].unflatten_fn(dims, context) if isinstance(value, (list, tuple)) else dims
