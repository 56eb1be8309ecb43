"""Values in a trace whose shape, dtype and device are known, and numbers that are computed from sizes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute, Proxy, TraceError

from qat_lightning.modes.fx.layer_settings import TracedValue

_NOT_KNOWN = frozenset({"requires_grad", "grad", "grad_fn", "is_leaf", "data_ptr", "_version", "item", "tolist"})
"""Attributes that a tensor without values cannot answer for the real one."""


class Known(TracedValue):
    """A value of a trace whose metadata is known from the example.

    Args:
        node: The node that computes it.
        tracer: A `qat_lightning.modes.fx.shapes.ShapesTracer`.
        values: Its metadata in each call that is followed.
    """

    def __init__(self, node: fx.Node, tracer: Any, values: tuple[Any, ...]) -> None:
        super().__init__(node, tracer)
        self.tracer: Any
        self.values = values


class KnownTensor(Known):
    """A tensor: queries of its shape, dtype and device return plain values; its own values are unknown."""

    def __getattr__(self, name: str) -> Any:
        if name in _NOT_KNOWN and not (name == "requires_grad" and self.node.op == "get_attr"):
            return Attribute(self, name)
        value = getattr(self.values[0], name)  # or raises an AttributeError, like a tensor
        if callable(value):
            return Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.assign(self, index, value)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, position) for position in range(len(self))])


class TensorProxy(TracedValue):
    """A parameter or buffer in a trace, whose shape is known."""

    def __init__(self, node: fx.Node, tracer: Any, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self._tensor = tensor

    @property
    def shape(self) -> torch.Size:
        """Like that of the tensor."""
        return self._tensor.shape

    @property
    def ndim(self) -> int:
        """Like that of the tensor."""
        return self._tensor.ndim

    @property
    def requires_grad(self) -> bool:
        """Like that of the tensor."""
        return self._tensor.requires_grad

    def size(self, dim: int | None = None) -> Any:
        """Like that of the tensor."""
        return self._tensor.size() if dim is None else self._tensor.size(dim)

    def dim(self) -> int:
        """Like that of the tensor."""
        return self._tensor.ndim

    def numel(self) -> int:
        """Like that of the tensor."""
        return self._tensor.numel()

    nelement = numel

    def __len__(self) -> int:
        return len(self._tensor)

    def __iter__(self) -> Iterator[Proxy]:
        return iter([operator.getitem(self, position) for position in range(len(self._tensor))])


class KnownNumber(Known):
    """A number, or a query of one, that differs between calls: arithmetic on it becomes part of the graph."""

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self))

    def __int__(self) -> int:
        return int(self.tracer.decide(self))

    def __index__(self) -> int:
        return int(self.tracer.decide(self))

    def __float__(self) -> float:
        return float(self.tracer.decide(self))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tracer.decide(self), digits)

    def __getattr__(self, name: str) -> Any:
        getattr(self.values[0], name)  # raises an AttributeError, like a number
        return Attribute(self, name)


class KnownKind(Known):
    """A dtype or device: that of the example while tracing, and that of the tensor whenever the graph runs."""

    @property
    def value(self) -> Any:
        """That of the example."""
        return self.values[0]

    def __eq__(self, other: object) -> bool:
        return bool(self.value == plain(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.value)

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name)


class Sizes(tuple[Any, ...]):
    """The shape of a tensor in a trace: plain numbers, and numbers that depend on the number of samples."""

    __slots__ = ()

    def numel(self) -> Any:
        """The product, like that of `torch.Size`."""
        product: Any = 1
        for size in self:
            product = product * size
        return product


def plain(value: Any) -> Any:
    """The dtype or device that a value stands for; anything else unchanged."""
    return value.value if isinstance(value, KnownKind) else value


def stands_for(value: Any) -> Any:
    """The example's value for a value of a trace; anything else unchanged.

    Raises:
        torch.fx.proxy.TraceError: The trace does not know it, because it has no example or could not follow it there.
    """
    if isinstance(value, Known):
        return value.values[0]
    if isinstance(value, TensorProxy):
        return value._tensor
    if isinstance(value, Proxy):
        raise TraceError("this decision depends on the type of a value that is only known when the network runs")
    return _SIZE if isinstance(value, Sizes) else value


def is_instance(value: Any, kinds: Any) -> bool:
    """``isinstance``, which checks a value of a trace by what it stands for."""
    return isinstance(value, kinds) or isinstance(stands_for(value), kinds)


_SIZE = Tensor().shape
