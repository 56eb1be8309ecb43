"""Detecting Python reads of tensors during TorchScript tracing, which a trace would turn into constants.

``if x.shape[1] == 8``, ``float(x.mean())`` and ``range(len(x))`` leave no operator in a trace. A network that reads
*values* of its inputs cannot be traced, because every call would use those of the example. A network that reads only
*sizes* can be traced: the file reads them again in each call, and raises an error if they differ.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qat_lightning.artifact.operations import words
from qat_lightning.errors import ExportError

_CONVERSIONS = words("__bool__ __complex__ __float__ __index__ __int__ __len__ item tolist")
"""Methods of a tensor that return its values, or its length, as Python objects."""
_COMPARISONS = words("__array__ __contains__ allclose equal is_nonzero numpy")
"""Functions of tensors whose result always depends on values, not on sizes alone."""
_SIZES = frozenset({"aten::size", "aten::numel", "aten::dim", "aten::len"})
_LIBRARIES = ("torch", "qat_lightning")
_DISPATCH = frozenset({"torch.overrides", "torch._tensor", __name__})
"""Modules that may be on the stack between the reading code and this module."""


class TracedReads(TorchFunctionMode):
    """Checks each Python read of a tensor, within a ``with`` block around a trace.

    Reads by torch and by this package are not checked.

    Attributes:
        sizes: Where sizes were read, as ``file:line``.

    Raises:
        ExportError: Code reads values of an input, or of a tensor computed from it; raised in that code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and check it if it reads a tensor."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _CONVERSIONS or name in _COMPARISONS or func is torch.tensor:
            place = _reader()
            if place:
                self._look(name, args, result, place)
        return result

    def _look(self, name: str, args: Any, result: Any, place: str) -> None:
        given = [leaf for leaf in _leaves(args) if isinstance(leaf, Tensor)]
        origins = [_origin(tensor) for tensor in given] if name != "__len__" else ["sizes"]
        if "values" in origins:
            what = "branches on" if name in ("__bool__", *_COMPARISONS) else f"takes a Python number ({name}) from"
            raise ExportError(
                f"its forward {what} the values of a tensor, at {place}, and a trace would keep what they are in the "
                "example. Compute with tensors there: torch.where chooses by values"
            )
        if "sizes" not in origins or name in _COMPARISONS:
            return
        if place not in self.sizes:
            self.sizes.append(place)
        for tensor, value in _read(name, given, result):
            _require_compiled()(tensor, float(value), place)


def _leaves(values: Any) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _read(name: str, given: list[Tensor], result: Any) -> Iterable[tuple[Tensor, Any]]:
    """Yield one-element tensors, and the value read from each."""
    if name == "__len__":
        yield torch.as_tensor(given[0].shape[0]), result
    elif name == "tolist":
        yield from zip(given[0].reshape(-1), _leaves(result if isinstance(result, list) else [result]), strict=True)
    elif name == "tensor":
        yield from ((tensor, tensor) for tensor in given if _origin(tensor) == "sizes")
    else:
        yield given[0], result


def _origin(tensor: Tensor) -> str:
    """Return whether a traced tensor depends on ``"values"`` of the inputs, only on ``"sizes"``, or on neither."""
    found = "nothing"
    bindings: Any = torch._C
    waiting, seen = [bindings._get_value_trace(tensor)], set[str]()
    while waiting:
        value = waiting.pop()
        if value.debugName() in seen:
            continue
        seen.add(value.debugName())
        node = value.node()
        kind = node.kind()
        if kind == "prim::Param" or node.isNondeterministic():
            return "values"
        if kind in _SIZES:
            found = "sizes"
            continue
        waiting += node.inputs()
    return found


def _reader() -> str:
    """Return the location in the user's code that reads; empty if a library does."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "") in _DISPATCH:
        frame = frame.f_back
    if frame is None or frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@functools.cache
def _require_compiled() -> Callable[[Tensor, float, str], Tensor]:
    compiled: Callable[[Tensor, float, str], Tensor] = torch.jit.script(_require)
    return compiled


def _require(found: Tensor, value: float, place: str) -> Tensor:
    if float(found) != value:
        raise RuntimeError(
            f"this file was traced for inputs of other sizes: its network reads sizes in Python, at {place}, where "
            f"{value} was found in the example and {float(found)} now"
        )
    return found
