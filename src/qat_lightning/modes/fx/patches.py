"""Patched Python and PyTorch functions that accept the values of a trace.

``isinstance(x, Tensor)``, ``type(x)`` and ``len(x)`` are plain functions, and ``torch.zeros(n)`` does not accept a
number that is only a node. They are replaced while a trace is made; the first three only in the modules of the
network's own code.
"""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.proxy import Proxy
from torch.overrides import is_tensor_method_or_property

from qat_lightning.modes.fx.known import KnownKind, KnownTensor, Sizes, is_instance, plain, stands_for

_FACTORIES = (
    *("arange", "as_tensor", "empty", "eye", "full", "full_like", "linspace", "ones"),
    *("rand", "randint", "randn", "tensor", "zeros"),
)
_SHAPING = ("broadcast_to", "chunk", "narrow", "permute", "reshape", "roll", "split", "tile", "unflatten")
"""Functions that take sizes besides a tensor."""
_METHODS = (
    *("chunk", "expand", "narrow", "new_empty", "new_full", "new_ones", "new_zeros"),
    *("repeat", "reshape", "to", "type", "view"),
)
"""Methods of a tensor outside of the graph that may be called with a value of the graph."""


@contextmanager
def answering(tracer: Any, network: nn.Module) -> Iterator[None]:
    """Within the block, functions that are called with values of ``tracer`` answer from the example."""
    is_tensor_method_or_property(Tensor.add)  # upstream caches the methods that it finds the first time
    with ExitStack() as stack:
        for name in (*_FACTORIES, *_SHAPING):
            stack.enter_context(_replaced(torch, name, _recording(tracer, getattr(torch, name), "call_function")))
        for name in ("finfo", "iinfo"):
            stack.enter_context(_replaced(torch, name, _of_plain(getattr(torch, name))))
        for name in _METHODS:
            stack.enter_context(_replaced(Tensor, name, _recording(tracer, getattr(Tensor, name), "call_method")))
        for scope in _scopes(network):
            stack.enter_context(_named(scope, "len", _length))
        yield


@contextmanager
def answering_kinds(network: nn.Module) -> Iterator[None]:
    """Within the block, questions about the type of a value are answered by what the value stands for.

    A trace without an example ends at such a question, since any answer would be a guess at the path that is taken.
    """
    asked: Any = torch.jit.isinstance
    with ExitStack() as stack:
        stack.enter_context(_replaced(torch, "is_tensor", lambda value: is_instance(value, Tensor)))
        stack.enter_context(
            _replaced(torch.jit, "isinstance", lambda value, kind: asked(pytree.tree_map(stands_for, value), kind))
        )
        for scope in _scopes(network):
            stack.enter_context(_named(scope, "isinstance", is_instance))
            stack.enter_context(_named(scope, "type", _Type))
        yield


class _LikeType(type):
    """The class of `_Type`, which makes it behave like ``type`` itself when called, compared and checked against."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made: Any = type(*map(stands_for, args), **kwargs)
        return Tensor if made is FakeTensor else made

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, type)

    def __eq__(cls, other: object) -> bool:
        return other is type or other is cls

    def __hash__(cls) -> int:
        return hash(type)


class _Type(metaclass=_LikeType):
    """``type``, which answers for a value of a trace by what it stands for."""


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, KnownTensor) else builtins.len(value)


def _recording(tracer: Any, function: Callable[..., Any], op: str) -> Callable[..., Any]:
    """Call ``function``, or create a node for it if an argument is a value of the graph."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Proxy)]
        if not given:
            return function(*args, **kwargs)
        if all(isinstance(leaf, KnownKind) for leaf in given):
            args, kwargs = pytree.tree_map(plain, (args, kwargs))
            return function(*args, **kwargs)
        target: Any = function.__name__ if op == "call_method" else function
        return tracer.create_proxy(op, target, args, kwargs)

    return call


def _leaves(value: Any) -> list[Any]:
    """The leaves of a value, including the sizes in a shape, which pytree treats as one leaf."""
    leaves = pytree.tree_leaves(value)
    return [part for leaf in leaves for part in (leaf if isinstance(leaf, Sizes) else [leaf])]


def _of_plain(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return call


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _named(scope: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    if name in scope:
        yield
        return
    scope[name] = value
    try:
        yield
    finally:
        scope.pop(name, None)


def _scopes(network: nn.Module) -> list[dict[str, Any]]:
    """The global namespaces of a network's code: those of its classes' modules and of their packages."""
    classes = {cls for module in network.modules() for cls in type(module).__mro__}
    names = {cls.__module__ for cls in classes}
    packages = {name.partition(".")[0] for name in names} - {"torch", "builtins", "qat_lightning", "lightning", "abc"}
    found = [
        vars(module)
        for name, module in list(sys.modules.items())
        if name in packages or name.partition(".")[0] in packages
    ]
    return list({id(scope): scope for scope in found}.values())
