"""Which layers follow one another: found by running the network once on an example and looking on.

Forward hooks see the modules, a `TorchFunctionMode` sees every function. A tensor is known by its id and its version,
so that an in-place ReLU is a step of its own; all are kept alive, so that no id comes twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.graph.structures import look_into
from qat_lightning.layers.operators import KEEPS_GRID, module_types
from qat_lightning.modes.eager.following import batchnorm_behind, follower
from qat_lightning.modes.protocol import EXCLUDED
from qat_lightning.modes.without_arithmetic import nested
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.recipe import Recipe

Key = tuple[int, int]
Inside = AbstractContextManager[Any] | None

HEAD_TYPES = module_types("convolution", "linear")
_ACTIVATION_TYPES = module_types("relu", "clamp")

_VALUE_GETTERS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_METADATA = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "__len__", "is_contiguous", "is_floating_point",
        "is_complex", "is_signed", "is_inference", "get_device", "element_size", "__hash__", "requires_grad_",
    }
)  # fmt: skip


def function_name(function: Any) -> str | None:
    """The name of a function that a torch-function handler gets; None if it asks for shapes and the like only."""
    name: str = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        owner: str = getattr(getattr(function, "__self__", None), "__name__", "")
        return owner if owner in _VALUE_GETTERS or name == "__set__" else None
    return None if name in _METADATA else name


@dataclass(frozen=True)
class Chain:
    """A layer and what its int8 kernel does besides; plain values, as a file holds them.

    Attributes:
        name: The convolution or linear layer.
        kind: Its type's name.
        batchnorm: The BatchNorm folded into it.
        activation: The activation fused with it.
        limit: The upper end of that activation; None for ReLU.
        grid_of: The chain on whose grid every input of the example was already.
        reached: Whether the example ran it.
        calls: How many calls of it, within a forward pass, have grids of their own.
    """

    name: str
    kind: str
    batchnorm: str | None = None
    activation: str | None = None
    limit: float | None = None
    grid_of: str | None = None
    reached: bool = True
    calls: int = 1

    @property
    def links(self) -> tuple[str, ...]:
        """The modules behind the layer, in order."""
        return tuple(name for name in (self.batchnorm, self.activation) if name is not None)

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


@dataclass(frozen=True)
class _Call:
    """One call of a module, or of a function."""

    module: nn.Module | None
    function: str
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    output_dim: int = 0


class Observation(TorchFunctionMode):
    """Everything that one run of a network calls, in order; its result, and the tensors in it."""

    result: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._of: defaultdict[nn.Module, list[_Call]] = defaultdict(list)
        self._consumers: defaultdict[Key, list[_Call]] = defaultdict(list)
        self.returned: set[Key] = set()
        self._alive: list[Tensor] = []
        self._inside: list[tuple[Key, ...]] = []
        self._read: set[int] | None = None

    def keys(self, values: Any) -> tuple[Key, ...]:
        """The tensors in any structure."""
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        self._alive.extend(tensors)
        return tuple((id(tensor), tensor._version) for tensor in tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a function that the network calls, unless it is part of a module that is watched."""
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

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook. A module that works in place gives another object: who reads which shows by that."""
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

    def reads(self, module: nn.Module) -> bool:
        """Whether a function takes a tensor of ``module``'s, or the network returns it."""
        if self._read is None:
            functions = [call.inputs for call in self.calls if not call.module and call.function != "embedding"]
            self._read = {key[0] for keys in (*functions, self.returned) for key in keys}
        return any(id(own) in self._read for own in (*module._parameters.values(), *module._buffers.values()))

    def writes_over_its_input(self, module: nn.Module) -> bool:
        """Whether somebody reads what a call of ``module`` was given after it, and so what it left there."""
        given = {key for call in self._of[module] for key in call.inputs}
        read = (*self._consumers, *self.returned)
        return any(one == other and later > earlier for one, earlier in given for other, later in read)

    def consumers(self, key: Key) -> list[_Call]:
        """Every call that takes a tensor."""
        return self._consumers[key]

    def _note(self, call: _Call) -> None:
        self.calls.append(call)
        if call.module is not None:
            self._of[call.module].append(call)
        for key in set(call.inputs):
            self._consumers[key].append(call)


def observe(network: nn.Module, example: Example, context: Inside = None) -> Observation:
    """Run ``network`` once and look on, within a context; see `run_apart`.

    Raises:
        NetworkError: The network does not run on the example.
    """
    observation = Observation()
    handles = []
    for module in network.modules():
        if type(module) in (*HEAD_TYPES, *module_types("batchnorm"), *_ACTIVATION_TYPES):
            handles.append(module.register_forward_pre_hook(observation.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(observation.leave, with_kwargs=True))
    try:
        observation.result = run_apart(network, example, nested(context or nullcontext(), observation))
    except Exception as error:
        raise NetworkError(
            f"{type(network).__name__} does not run on its example inputs: {type(error).__name__}: {error}. Give "
            "example_inputs= that its forward takes."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    observation.returned = set(observation.keys(observation.result))
    return observation


@torch.no_grad()
def run_apart(network: nn.Module, example: Example, inside: Inside = None) -> Any:
    """Run ``network`` in eval mode without grad, and leave it, its buffers, the example and the RNG as they were."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    look_into(example.args, example.kwargs)
    # Copies: an in-place operation must not reach the caller's batch, nor inference tensors, which have no version.
    args, kwargs = tree_map(
        lambda v: v.detach().to(device).clone() if isinstance(v, Tensor) else v, (example.args, example.kwargs)
    )
    with _left_alone(network, device), inside or nullcontext():
        result = network(*args, **kwargs)
    look_into(result)
    return result


@contextmanager
def _left_alone(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode; flags, buffers and random numbers are as before when the block ends."""
    flags = {module: module.training for module in network.modules()}
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
    ]
    for module in flags:
        module.training = False
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if buffer is not None and value is not None:
                with torch.no_grad():
                    buffer.copy_(value)


def find_chains(
    network: nn.Module, observation: Observation, recipe: Recipe, prefix: str, *, int8: bool = True
) -> tuple[list[Chain], dict[str, str]]:
    """The chains of a network, and why its other convolutions and linear layers are in none.

    Args:
        network: The float network, as it was observed.
        observation: One run of it.
        recipe: Says which layers are selected.
        prefix: The network's own name, to which the recipe's globs are not relative.
        int8: Whether the chains are to run as int8 kernels, which not every layer has.
    """
    names = {module: name for name, module in network.named_modules()}
    chains: list[Chain] = []
    reasons: dict[str, str] = {}
    links = _Links(names, observation, replace(recipe, include=()), prefix)
    for module, name in names.items():
        if not isinstance(module, HEAD_TYPES):
            continue
        reason = why_not(module, recipe.target) if int8 else _why_no_weight(module)
        if not recipe.selects(join(prefix, name)):
            reason = EXCLUDED
        elif not reason and observation.reads(module):
            reason = "its parameters are used by a function, and not by calling the layer"
        if reason:
            reasons[name] = reason
            continue
        chains.append(links.chain(module, name))
    return _with_grids(chains, names, observation), reasons


def why_not(module: nn.Module, target: Backend) -> str:
    """Why a convolution or linear layer has no int8 kernel in eager mode; empty if it has one."""
    if type(module) not in HEAD_TYPES:
        return f"{type(module).__name__} is not quantized in mode='eager'"
    if isinstance(module, nn.Conv3d) and target.engine == "qnnpack":
        return "QNNPACK cannot save the weight of a Conv3d"
    if why := _why_no_weight(module):
        return why
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.padding_mode != "zeros":
            return f"int8 kernels do not have padding_mode={module.padding_mode!r}"
        pads = module._reversed_padding_repeated_twice
        if any(left != right for left, right in zip(pads[::2], pads[1::2], strict=True)):
            return "padding='same' is not the same on both sides here, which int8 kernels do not have"
    return ""


def _why_no_weight(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed (parametrized), and is no parameter"
    return "" if weight.is_floating_point() else f"its weight is {weight.dtype}"


def join(prefix: str, name: str) -> str:
    """A dotted name."""
    return ".".join(part for part in (prefix, name) if part)


class _Links:
    """Finds what follows a layer."""

    def __init__(
        self, names: Mapping[nn.Module, str], observation: Observation, excluding: Recipe, prefix: str
    ) -> None:
        self.names, self.observation = names, observation
        self.excluding, self.prefix = excluding, prefix

    def chain(self, head: nn.Module, name: str) -> Chain:
        """The chain that begins with ``head``."""
        calls = self.observation.of(head)
        chain = Chain(name, type(head).__name__, reached=bool(calls))
        batchnorm = batchnorm_behind(head, self.observation)
        if batchnorm is not None and self._not_excluded(batchnorm):
            chain = replace(chain, batchnorm=self.names[batchnorm])
            behind = follower(batchnorm, self.observation)
        else:
            behind = follower(head, self.observation)
        if behind is None or type(behind) not in _ACTIVATION_TYPES or not self._not_excluded(behind):
            return chain
        if self.observation.writes_over_its_input(behind):
            return chain
        limit = None
        if isinstance(behind, nn.Hardtanh):
            if behind.min_val != 0 or behind.max_val <= 0:
                return chain
            limit = float(behind.max_val)
        return replace(chain, activation=self.names[behind], limit=limit)

    def _not_excluded(self, module: nn.Module) -> bool:
        return self.excluding.selects(join(self.prefix, self.names[module]))


def _with_grids(chains: list[Chain], names: Mapping[nn.Module, str], observation: Observation) -> list[Chain]:
    """Note for each chain whose grid its inputs were on, if they came there through functions that keep the grid."""
    modules = {name: module for module, name in names.items()}
    source: dict[Key, str] = {}
    direct: set[Key] = set()
    for chain in chains:
        for call in observation.of(modules[chain.name]):
            outputs = call.outputs
            for _ in chain.links:
                (link,) = observation.consumers(outputs[0])
                outputs = link.outputs
            source[outputs[0]] = chain.name
            direct.add(outputs[0])
    for call in observation.calls:
        exact = call.function in (*KEEPS_GRID, "ReLU")
        origins = {source.get(key) for key in call.inputs}
        if exact and len(origins) == 1 and None not in origins:
            source.update({key: o for o in origins if o for key in call.outputs if key not in source})
    result = []
    for chain in chains:
        inputs = [key for call in observation.of(modules[chain.name]) for key in call.inputs]
        origins = {source.get(key) for key in inputs}
        shared = origins.pop() if len(origins) == 1 and not set(inputs) <= direct else None
        result.append(replace(chain, grid_of=shared))
    return result


def float_functions(observation: Observation) -> dict[str, int]:
    """The functions that compute in float, and how often the example ran each."""
    counts = Counter(call.function for call in observation.calls if call.module is None)
    return {name: count for name, count in sorted(counts.items()) if name not in KEEPS_GRID}
