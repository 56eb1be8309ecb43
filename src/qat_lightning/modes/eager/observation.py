"""One observed run of a network on an example: which modules and functions it calls, with which tensors.

Forward hooks see modules, a `TorchFunctionMode` sees functions. A tensor is identified by its id and version, so that
an in-place ReLU is a separate step; all tensors are kept alive, so that ids are unique.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.graph.buffers import write_back
from qat_lightning.graph.example import Example, running_its_example
from qat_lightning.graph.generators import generators_kept
from qat_lightning.graph.structures import look_into
from qat_lightning.graph.training_flags import evaluating, training
from qat_lightning.layers.operators import module_types
from qat_lightning.layers.transformer import Projection
from qat_lightning.modes.without_arithmetic import nested

HEAD_TYPES: tuple[type[nn.Module], ...] = (*module_types("convolution", "linear"), Projection)
CHAIN_TYPES = (*HEAD_TYPES, *module_types("transposed"))
"""Layers that may begin a chain of int8 layers; transposed convolutions have another channel dimension."""
ACTIVATION_TYPES = module_types("relu", "clamp")

Key = tuple[int, int]
Inside = AbstractContextManager[Any] | None

_VALUE_GETTERS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_METADATA = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "__len__", "is_contiguous", "is_floating_point",
        "is_complex", "is_signed", "is_inference", "get_device", "element_size", "__hash__", "requires_grad_",
    }
)  # fmt: skip


def function_name(function: Any) -> str | None:
    """The name of a function in a torch-function handler; None if it only queries shapes and the like."""
    name: str = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        owner: str = getattr(getattr(function, "__self__", None), "__name__", "")
        return owner if owner in _VALUE_GETTERS or name == "__set__" else None
    return None if name in _METADATA else name


@dataclass(frozen=True)
class _Call:
    """One call of a module, or of a function."""

    module: nn.Module | None
    function: str
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    output_dim: int = 0


class Observation(TorchFunctionMode):
    """All calls of one run of a network, in order; its result, and the tensors in it.

    Args:
        heads: Types of layers that are recorded as single calls, along with the types that may follow them.

    Attributes:
        sized: Layers that are called with an output size.
    """

    result: Any = None

    def __init__(self, heads: tuple[type[nn.Module], ...] = HEAD_TYPES) -> None:
        super().__init__()
        self.heads = heads
        self.sized: set[nn.Module] = set()
        self.calls: list[_Call] = []
        self._of: defaultdict[nn.Module, list[_Call]] = defaultdict(list)
        self._consumers: defaultdict[Key, list[_Call]] = defaultdict(list)
        self.returned: set[Key] = set()
        self._alive: list[Tensor] = []
        self._inside: list[tuple[Key, ...]] = []
        self._read: dict[bool, set[int]] | None = None

    def keys(self, values: Any) -> tuple[Key, ...]:
        """The keys of all tensors in a structure."""
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        self._alive.extend(tensors)
        return tuple((id(tensor), tensor._version) for tensor in tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a function that the network calls, unless it runs inside a watched module."""
        kwargs = kwargs or {}
        name = function_name(func)
        if self._inside or name is None:
            return func(*args, **kwargs)
        inputs = self.keys((args, kwargs))
        result = func(*args, **kwargs)
        if inputs:
            self._note(_Call(None, name, inputs, self.keys(result)))
        return result

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook."""
        self._inside.append(self.keys((args, kwargs)))
        if isinstance(module, module_types("transposed")) and _size_given(*args, **kwargs):
            self.sized.add(module)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook. A module that works in place returns a new object, which shows its readers."""
        if isinstance(output, Tensor) and any(output is given for given in args):
            output = output.view_as(output)
        inputs = self._inside.pop()
        if not self._inside:
            dim = output.dim() if isinstance(output, Tensor) else 0
            self._note(_Call(module, type(module).__name__, inputs, self.keys(output), dim))
        return output

    def of(self, module: nn.Module) -> list[_Call]:
        """The calls of one module."""
        return self._of[module]

    def reads(self, module: nn.Module, *, looked_up: bool = False) -> bool:
        """Whether a function takes a parameter or buffer of ``module``, or the network returns one.

        Args:
            module: A module of the network.
            looked_up: Whether looking up rows, as ``F.embedding`` does, counts.
        """
        if self._read is None:
            self._read = {False: self._tensors_of_functions(but=("embedding",)), True: self._tensors_of_functions()}
        read = self._read[looked_up]
        return any(id(own) in read for own in (*module._parameters.values(), *module._buffers.values()))

    def _tensors_of_functions(self, but: tuple[str, ...] = ()) -> set[int]:
        functions = [call.inputs for call in self.calls if not call.module and call.function not in but]
        return {key[0] for keys in (*functions, self.returned) for key in keys}

    def writes_over_its_input(self, module: nn.Module) -> bool:
        """Whether the input of a call of ``module`` is read afterwards, and so what the call left in it."""
        given = {key for call in self._of[module] for key in call.inputs}
        read = (*self._consumers, *self.returned)
        return any(one == other and later > earlier for one, earlier in given for other, later in read)

    def consumers(self, key: Key) -> list[_Call]:
        """All calls that take a tensor."""
        return self._consumers[key]

    def _note(self, call: _Call) -> None:
        self.calls.append(call)
        if call.module is not None:
            self._of[call.module].append(call)
        for key in set(call.inputs):
            self._consumers[key].append(call)


def _size_given(input: Tensor, output_size: Any = None) -> bool:
    """Whether a transposed convolution is called with an output size."""
    return output_size is not None


def observe(
    network: nn.Module,
    example: Example,
    context: Inside = None,
    *,
    heads: tuple[type[nn.Module], ...] = HEAD_TYPES,
    trains: bool = False,
) -> Observation:
    """Run ``network`` once and record it, within a context; see `run_apart` and `Observation`.

    Raises:
        NetworkError: The network does not run on the example.
    """
    observation = Observation(heads)
    handles = []
    for module in network.modules():
        if type(module) in (*heads, *module_types("batchnorm", "table"), *ACTIVATION_TYPES):
            handles.append(module.register_forward_pre_hook(observation.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(observation.leave, with_kwargs=True))
    try:
        with running_its_example(network):
            observation.result = run_apart(
                network, example, nested(context or nullcontext(), observation), trains=trains
            )
    finally:
        for handle in handles:
            handle.remove()
    observation.returned = set(observation.keys(observation.result))
    return observation


@torch.no_grad()
def run_apart(network: nn.Module, example: Example, inside: Inside = None, *, trains: bool = False) -> Any:
    """Run ``network`` in eval or training mode without grad; module, buffers, example and RNGs stay unchanged.

    A parameter whose data ``forward`` assigns, as ``self.weight.data = ...`` does, gets its own back.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    look_into(example.args, example.kwargs)
    # Copies: an in-place operation must not change the caller's batch, and inference tensors have no version.
    args, kwargs = tree_map(
        lambda v: v.detach().to(device).clone() if isinstance(v, Tensor) else v, (example.args, example.kwargs)
    )
    with _left_alone(network, device, trains), generators_kept(network), inside or nullcontext():
        result = network(*args, **kwargs)
    look_into(result)
    return result


@contextmanager
def _left_alone(network: nn.Module, device: torch.device, trains: bool) -> Iterator[None]:
    """Eval or training mode; flags, buffers, assigned parameters and random state are restored at the end."""
    data = [(parameter, parameter.data) for parameter in network.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        mode = training(network) if trains else evaluating(network)
        with mode, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for parameter, before in data:
            if type(before) is Tensor and _memory(parameter.data) != _memory(before):
                parameter.data = before
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if buffer is not None and value is not None:
                write_back(buffer, value)


def _memory(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
