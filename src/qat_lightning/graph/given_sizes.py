"""The input sizes that a graph is valid for, if it contains sizes as constants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from qat_lightning.graph.structures import look_into

ANY = -1
"""Placeholder in a shape for a dimension of any size."""


@dataclass(frozen=True)
class GivenInput:
    """One leaf of the inputs: a tensor, or a plain value that the graph depends on.

    Attributes:
        path: Its place in the inputs, as a Python expression.
        shape: The shape of a tensor, with `ANY`; None for a plain value.
        value: The value, if it is not a tensor.
    """

    path: str
    shape: tuple[int, ...] | None
    value: Any = None

    def __str__(self) -> str:
        return f"{self.path}: {_shape(self.shape) if self.shape is not None else repr(self.value)}"


@dataclass(frozen=True)
class GivenSizes:
    """The input sizes that a graph is valid for.

    Attributes:
        network: The network's class, for messages.
        names: The names of the positional inputs, in order.
        inputs: The inputs with fixed sizes or values.

    Example:
        >>> import torch
        >>> sizes = GivenSizes("Net", ("x",), (GivenInput("x", (ANY, 3, 8, 8)),))
        >>> sizes.others((torch.zeros(4, 3, 8, 8),), {}), sizes.others((torch.zeros(4, 3, 9, 8),), {})
        ([], ['x: (4, 3, 9, 8)'])
    """

    network: str
    names: tuple[str, ...]
    inputs: tuple[GivenInput, ...]

    def others(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Describe the inputs of a call that do not match."""
        wanted = {given.path: given for given in self.inputs}
        found = []
        for path, leaf in leaves_by_path(self.names, args, kwargs):
            given = wanted.pop(path, None)
            if given is not None and not _fits(given, leaf):
                found.append(f"{path}: {_shape(tuple(leaf.shape)) if isinstance(leaf, Tensor) else repr(leaf)}")
        return found

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A key for the sizes of a call; equal for all calls that the same graph can take."""
        free = {given.path: given.shape for given in self.inputs if given.shape is not None}
        found = []
        for path, leaf in leaves_by_path(self.names, args, kwargs):
            if isinstance(leaf, Tensor):
                shape = free.get(path, ())
                found.append(
                    (path, *(ANY if shape[dim : dim + 1] == (ANY,) else n for dim, n in enumerate(leaf.shape)))
                )
            else:
                found.append((path, repr(leaf)))
        return tuple(found)

    def refusal(self, others: list[str]) -> str:
        """The error message for a call with other sizes."""
        wanted = [str(given) for given in self.inputs if given.path in {other.partition(": ")[0] for other in others}]
        return (
            f"{self.network} was traced for {', '.join(wanted)}, since its forward computes with these sizes, and is "
            f"called with {', '.join(others)}. Use inputs of those sizes, give example_inputs= of the sizes that "
            "are used, or use mode='eager', which needs no graph."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> GivenSizes:
        return self


def leaves_by_path(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """The leaves of the inputs of a call, each with its path.

    Args:
        names: The names of the inputs that may be positional.
        args: Positional inputs.
        kwargs: Keyword inputs.
    """
    look_into(args, kwargs)
    named = dict(zip(names, args, strict=False)) | kwargs
    for name, value in named.items():
        for path, leaf in pytree.tree_flatten_with_path(value, is_leaf=lambda part: part is None)[0]:
            yield name + pytree.keystr(path), leaf


def _fits(given: GivenInput, leaf: Any) -> bool:
    if given.shape is None:
        return not isinstance(leaf, Tensor) and type(leaf) is type(given.value) and bool(leaf == given.value)
    return (
        isinstance(leaf, Tensor)
        and leaf.dim() == len(given.shape)
        and all(want in (ANY, have) for want, have in zip(given.shape, leaf.shape, strict=True))
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join("any" if size == ANY else str(size) for size in shape) + ")"
