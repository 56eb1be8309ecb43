"""Recording a call of a network as its list of kernels, which TorchScript's interpreter runs without Python.

Every operator that reaches a kernel is recorded once, at torch's dispatcher, whatever Python code calls it: a graph, a
module with loops, a library. The recording is `TorchScript <https://docs.pytorch.org/docs/stable/jit.html>`_ source
with one call after the other. Nothing is traced or optimized: the same kernels run in the same order on the same packed
weights. Anything that would not be valid for other inputs of the same form is detected during recording and ends it: a
number read from a tensor, a shape that depends on values, randomness, a write to memory that outlives the call.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from qat_lightning.artifact.operations import words

_MOST_OPERATORS = 20_000
_LITERAL = 1024
"""Largest number of values of a tensor that code may write out, as ``torch.tensor([...])``."""
_NAMESPACES = frozenset({"aten", "prims", "quantized", "quantized_decomposed", "onednn", "mkldnn", "mkldnn_prepacked"})
"""Namespaces of torch's own operators, whose schemas declare their writes; others may have undeclared effects."""
_GRIDS = frozenset({"aten::q_scale", "aten::q_zero_point", "aten::q_per_channel_axis", "aten::qscheme"})
"""Queries of a quantized tensor's grid, which only `_FOUND_GRIDS` compute from values."""
_FOUND_GRIDS = frozenset({"aten::quantize_per_tensor_dynamic"})
_LOOKS = words(
    """
    __array__ __array_wrap__ __cuda_array_interface__ __dlpack__ apply_ const_data_ptr data_ptr map2_ map_ numpy
    requires_grad_ resize_ set_ share_memory_ storage tolist typed_storage untyped_storage
    """
)
"""Methods of a tensor that expose or replace its memory without the dispatcher."""


class CannotRecordError(Exception):
    """The call has effects or results that a recording would not reproduce."""


class Recording:
    """A call of a network as TorchScript that runs the same kernels.

    Args:
        call: Runs the network on ``tensors``, and returns the tensors of its result.
        tensors: The inputs.
        holds: Whether a tensor outlives the call, such as a weight.

    Raises:
        CannotRecordError: The call cannot be recorded.

    Example:
        >>> recording = Recording(lambda x: [x * 2 + 1], [torch.ones(2)], lambda tensor: False)
        >>> recording.compiled()(torch.zeros(2))
        [tensor([1., 1.])]
    """

    def __init__(
        self, call: Callable[..., list[Tensor]], tensors: list[Tensor], holds: Callable[[Tensor], bool]
    ) -> None:
        recorder = _Recorder(tensors, holds)
        with _Watch(), recorder:
            result = call(*tensors)
        self.lines = recorder.lines
        self.constants = recorder.constants
        self.count = len(tensors)
        self.result = result
        self.source = recorder.source(result)

    def compiled(self) -> Callable[..., list[Tensor]]:
        """A function from the input tensors to those of the result, in one call of TorchScript's interpreter.

        Tensors that the kernels read are attributes of a scripted module, because arguments would be checked in every
        call. `torch.jit.script` would keep the code of every module for the lifetime of the process; this one has its
        own compilation unit, which is freed with it.
        """
        bindings: Any = torch._C
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            module = bindings.ScriptModule("__torch__.Replay", bindings.CompilationUnit(), False)
            for place, constant in enumerate(self.constants):
                kind = bindings._jit_try_infer_type(constant).type()
                module._register_attribute(f"c{place}", kind, constant)
            module._define(bindings.ConcreteModuleType.from_jit_type(module._type()), self.source, {"torch": torch}.get)
        run: Callable[..., list[Tensor]] = module._get_method("replay")
        return run


class _Watch(TorchFunctionMode):
    """Ends a recording if a tensor's memory is read without an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _LOOKS:
            raise CannotRecordError(f"{func.__name__} reads a tensor")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Writes a line for each operator. Holds only constants; other memory is freed as in the call itself."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: otherwise torch would import its compiler (80 MB and two seconds), only to exclude this mode from it."""
        return False

    def __init__(self, tensors: list[Tensor], holds: Callable[[Tensor], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._holds = holds
        self.lines: list[str] = []
        self.constants: list[Any] = []
        self._names: Any = WeakIdKeyDictionary()
        self._objects: dict[int, str] = {}
        self._computed: Any = WeakIdKeyDictionary()
        self._outer: set[int] = set()
        self._written: set[int] = set()
        for place, tensor in enumerate(tensors):
            self._names[tensor] = f"x{place}"
            self._computed[tensor] = True
            self._outer.add(_memory(tensor))
        self._inputs = [f"x{place}" for place in range(len(tensors))]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse(func, args, kwargs)
        name = func.name().partition(".")[0]
        if len(self.lines) > _MOST_OPERATORS:
            raise CannotRecordError("it has too many operators")
        # Name the inputs before the call, which may write to them.
        call = ", ".join([*map(self._spell, args), *(f"{key}={self._spell(value)}" for key, value in kwargs.items())])
        given = [leaf for leaf in _leaves((args, *kwargs.values())) if isinstance(leaf, Tensor)]
        computed = any(leaf in self._computed or _memory(leaf) in self._written for leaf in given)
        self._refuse_writes(func, args, kwargs)
        result = func(*args, **kwargs)
        space, _, operator = name.partition("::")
        if isinstance(result, Tensor):
            self._made(result, computed, f"torch.ops.{space}.{operator}({call})")
        elif isinstance(result, (tuple, list)):
            self._made_several(result, computed, f"torch.ops.{space}.{operator}({call})")
        elif result is not None and computed and name not in _GRIDS:
            raise CannotRecordError(f"{name} reads a value")
        return result

    def source(self, result: list[Tensor]) -> str:
        """The recording as TorchScript."""
        returned = ", ".join(map(self._spell, result))
        head = ", ".join(["self", *(f"{name}: Tensor" for name in self._inputs)])
        body = "\n".join(f"    {line}" for line in [*self.lines, f"return [{returned}]"])
        return f"def replay({head}) -> List[Tensor]:\n{body}\n"

    def _made(self, result: Tensor, computed: bool, call: str) -> None:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {call}")
        self._names[result] = name
        if computed:
            self._computed[result] = True

    def _made_several(self, results: Iterable[Any], computed: bool, call: str) -> None:
        line = f"v{len(self.lines)}"
        self.lines.append(f"{line} = {call}")
        for place, result in enumerate(results):
            if not isinstance(result, Tensor):
                raise CannotRecordError("an operator yields what is no tensor")
            self._made(result, computed, f"{line}[{place}]")

    def _refuse_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise an error for a write to memory that was not created by the call."""
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in _leaves((target,)):
                if isinstance(tensor, Tensor):
                    if tensor not in self._names or _memory(tensor) in self._outer:
                        raise CannotRecordError(f"{func} writes to what outlives the call")
                    self._written.add(_memory(tensor))

    def _spell(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._name(value)
        if isinstance(value, torch.ScriptObject):
            return self._constant(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self._spell, value))}]"
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if value is None or type(value) in (bool, int, float, str):
            return repr(value)
        raise CannotRecordError(f"an operator is given a {type(value).__name__}")

    def _name(self, tensor: Tensor) -> str:
        name: str | None = self._names.get(tensor)
        if name is None:
            if tensor.numel() > _LITERAL and not self._holds(tensor):
                raise CannotRecordError("a tensor was made without an operator")
            self._outer.add(_memory(tensor))
            name = self._constant(tensor)
            self._names[tensor] = name
        return name

    def _constant(self, value: Any) -> str:
        name = self._objects.get(id(value))
        if name is None:
            name = self._objects[id(value)] = f"self.c{len(self.constants)}"
            self.constants.append(value)
        return name


def _refuse(func: Any, args: Any, kwargs: Any) -> None:
    """Raise an error for operators with other results in each call, or with shapes that depend on values."""
    name = func.name().partition(".")[0]
    if name.partition("::")[0] not in _NAMESPACES or name in _FOUND_GRIDS:
        raise CannotRecordError(f"{name} may do what is not known")
    if torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args, kwargs):
        raise CannotRecordError(f"{name} draws by chance")
    if torch.Tag.dynamic_output_shape in func.tags:
        indices = [leaf for leaf in _leaves(args[1:]) if isinstance(leaf, Tensor)]
        if name != "aten::index" or any(leaf.dtype in (torch.bool, torch.uint8) for leaf in indices):
            raise CannotRecordError(f"{name} gives a shape that depends on values")


def _drops_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator draws random numbers only for a dropout that is inactive."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if "dropout_p" in names:
        return bool(given.get("dropout_p", 0.0) == 0.0)
    return any(given.get(name) is False for name in ("train", "training"))


def _leaves(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _memory(tensor: Tensor) -> int:
    if tensor.is_mkldnn:  # a weight in a layout of oneDNN's, which has no views
        return -1
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have no storage
        raise CannotRecordError("a tensor without memory of its own") from None
