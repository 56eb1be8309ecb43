"""Running an int8 network without Python between its kernels, by recordings of repeated calls.

Int8 kernels are so fast that the Python code between them takes longer than they do. A recording (`Recording`) runs the
same kernels on the same packed weights without it. It is valid for one form of inputs (structure, shapes, strides,
dtypes and plain values), so decisions of forward that depend on these stay correct.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat_lightning.artifact.effects import Watched
from qat_lightning.artifact.recording import Recording
from qat_lightning.artifact.surroundings import Surroundings
from qat_lightning.layers.kernels import is_packed, packed_anew, packed_weights

CALLS_BEFORE = 4
"""Number of calls of a form that run unrecorded: for a few calls a recording is not worthwhile."""
_FORMS = 4
"""Number of forms with recordings; each but the first has packed weights of its own."""
_COUNTED = 64
"""Number of forms whose calls are counted at a time."""
_CHANGES = 8
"""Number of changes to its surroundings after which a network is no longer recorded."""
_PLAIN = (bool, int, float, str, type(None))

Frozen = Callable[..., Any]


@dataclass(frozen=True)
class _Kept:
    """A recording, and the state that it is valid for."""

    frozen: Frozen
    network: Callable[[], nn.Module | None]
    around: Surroundings

    def holds_for(self, network: nn.Module) -> bool:
        return self.network() is network and self.around.are_as_they_were()


class FrozenCalls:
    """Decides for each call of a network whether a recording runs instead, and creates the recordings.

    A recording is kept if it returns the same bits, on the inputs of the call and on others. It is not used while
    anything observes or changes the network: a hook on a module, an attribute that was set, a weight that was written
    to, another network, a tracer or compiler, a Python debugger or profiler, a torch mode, autocast.
    """

    def __init__(self) -> None:
        self._forget()
        self._changes = 0
        self._can = True
        self._recording = threading.Lock()

    def _forget(self) -> None:
        self._seen: dict[Any, int] = {}
        self._made: dict[Any, _Kept | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenCalls:
        """A copy makes its own recordings."""
        return FrozenCalls()

    def __reduce__(self) -> tuple[Any, ...]:
        """An unpickled copy makes its own recordings, too."""
        return FrozenCalls, ()

    def run(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs of ``network``, from a recording if there is one."""
        if not self._can or self._changes > _CHANGES or getattr(network, "is_one_kernel", False) or _is_watched():
            return network(*args, **kwargs)
        leaves, key = _form(args, kwargs)
        if key is None:
            return network(*args, **kwargs)
        kept = self._made.get(key)
        if kept is None:
            can = key not in self._made and len(self._made) < _FORMS and self._is_due(key)
            return self._recorded(network, key, args, kwargs) if can else network(*args, **kwargs)
        if not kept.holds_for(network):
            self._changes += 1
            self._made.pop(key, None)
            return network(*args, **kwargs)
        try:
            return kept.frozen(*leaves)
        except Exception:  # noqa: BLE001 - the network reports its own errors when it runs without TorchScript
            return network(*args, **kwargs)

    def _is_due(self, key: Any) -> bool:
        if len(self._seen) > _COUNTED:
            self._seen = {}
        calls = self._seen[key] = self._seen.get(key, 0) + 1
        return calls > CALLS_BEFORE

    def _recorded(self, network: nn.Module, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs of a call, which is recorded unless another thread is recording."""
        if not self._recording.acquire(blocking=False):
            return network(*args, **kwargs)
        try:
            return self._record(network, key, args, kwargs)
        finally:
            self._recording.release()

    def _record(self, network: nn.Module, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _tensors_copied(args, kwargs)
        first = not any(self._made.values())
        if first:
            _pack_anew(network)
        around = Surroundings(network)
        leaves = list(map(id, pytree.tree_leaves((args, kwargs))))
        with Watched(around) as watched:
            result = network(*args, **kwargs)
        self._seen.pop(key, None)
        writes = leaves != list(map(id, pytree.tree_leaves((args, kwargs)))) or not around.are_as_they_were()
        if not around.complete:  # a hook may be removed later
            self._changes += 1
        elif watched.acts or writes:
            self._can = False
            self._forget()
        else:
            frozen = freeze(network, *given, result, around, shares=first)
            self._made[key] = None if frozen is None else _Kept(frozen, weakref.ref(network), around)
        return result


def freeze(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    around: Surroundings,
    *,
    shares: bool = True,
) -> Frozen | None:
    """Record a network for inputs of one form; the result is called with their tensors. None if it cannot be recorded.

    Args:
        network: The network; a call of it only computes.
        args: Positional inputs of a call.
        kwargs: Keyword inputs of the call.
        result: The result of that call.
        around: The surroundings of the network; extended by the tensors that the recording reads.
        shares: Whether it runs on the network's own packed weights, and not on copies. oneDNN prepares a kernel for the
            shape that packed weights are first used with, and is slower for every other shape.

    Returns:
        The recording.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    results, structure = pytree.tree_flatten(result)
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in results):
        return None  # a number or an object would be fixed to that of this call
    given = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    computed = [place for place, leaf in enumerate(results) if isinstance(leaf, Tensor)]

    def flat(*tensors: Tensor) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(_put(leaves, given, tensors), spec)
        found = pytree.tree_leaves(network(*args, **kwargs))
        return [found[place] for place in computed]

    tensors = tuple(leaves[place] for place in given)
    try:
        recording = Recording(flat, list(_copies(tensors)), around.holds)
        if not shares:
            engine = torch.backends.quantized.engine
            recording.constants = [packed_anew(one, engine) if is_packed(one) else one for one in recording.constants]
        frozen = recording.compiled()
        if torch.is_inference_mode_enabled() and not any(results[place].is_inference() for place in computed):
            frozen = _outside_of_inference_mode(frozen)
        others = _others(tensors)
        if not _gives(frozen, tensors, [results[place] for place in computed]) or not _gives(
            frozen, others, flat(*_copies(others))
        ):
            return None
    except Exception:  # noqa: BLE001 - a call that cannot be recorded runs without a recording
        return None
    around.follow(value for value in recording.constants if isinstance(value, Tensor))
    if len(results) == 1 and structure.is_leaf():
        return lambda *tensors: frozen(*tensors)[0]
    empty: list[Any] = [None] * len(results)
    return lambda *tensors: pytree.tree_unflatten(_put(empty, computed, frozen(*tensors)), structure)


def _outside_of_inference_mode(frozen: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Make a recording return tensors that autograd can use, as the wrappers of eager int8 layers always do."""

    def replay(*tensors: Tensor) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return frozen(*tensors)

    return replay


def _pack_anew(network: nn.Module) -> None:
    """Replace a network's packed weights by new ones, for which no kernel was prepared yet."""
    for _, module, attribute, value in packed_weights(network):
        try:
            vars(module)[attribute] = packed_anew(value, torch.backends.quantized.engine)
        except RuntimeError:  # QNNPACK's 3-d convolutions do not return their weights
            continue


def _put(leaves: list[Any], places: list[int], tensors: Any) -> list[Any]:
    filled = list(leaves)
    for place, tensor in zip(places, tensors, strict=True):
        filled[place] = tensor
    return filled


def _copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(map(_copy, tensors))


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, even if they leave gaps in memory."""
    copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
    return copied.requires_grad_(tensor.requires_grad)


def _tensors_copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given: Any = pytree.tree_map(lambda leaf: _copy(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    copied: tuple[tuple[Any, ...], dict[str, Any]] = given
    return copied


def _others(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same values in a different order, so that indices stay valid."""
    return tuple(map(_shuffled, _copies(tensors)))


def _shuffled(tensor: Tensor) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
    return tensor.copy_(tensor.flatten()[order].view(tensor.shape))


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """The tensors of a call, and the key of its form; None if the call cannot be recorded."""
    modes = torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:  # the most common form of call; several times faster
        return [args[0]], (modes, _form_of(args[0])) if _is_ordinary(args[0]) else None
    if not _is_nested(args) or not _is_nested(kwargs):
        return [], None
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not all(map(_is_ordinary, tensors)) or len(set(map(id, tensors))) < len(tensors):
        return [], None  # code can check whether two arguments are the same object
    return tensors, (modes, spec, *map(_form_of, leaves))


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is a dense CPU tensor whose elements do not overlap."""
    return not (
        tensor.device.type != "cpu"
        or tensor.layout is not torch.strided
        or tensor.is_quantized
        or tensor.is_nested
        or tensor.is_neg()
        or tensor.is_conj()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or torch._debug_has_internal_overlap(tensor) == 1
    )


def _form_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad
    return type(leaf), leaf.hex() if isinstance(leaf, float) else leaf  # 0.0 is not -0.0, and NaN is NaN


def _is_nested(value: Any) -> bool:
    """Whether a value consists of tensors and plain values, in tuples, lists and dicts."""
    if type(value) in (tuple, list):
        return all(map(_is_nested, value))
    if type(value) is dict:
        return all(map(_is_nested, value.values()))
    return type(value) is Tensor or type(value) in _PLAIN


def _is_watched() -> bool:
    """Whether something observes the computation and has to see every op."""
    return bool(
        torch._C._get_tracing_state()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or sys.gettrace()
        or sys.getprofile()
    )


def _gives(frozen: Callable[..., list[Tensor]], tensors: tuple[Tensor, ...], wanted: list[Tensor]) -> bool:
    """Whether a recording returns the same bits in new memory, in its profiling runs and when optimized."""
    runs = [frozen(*_copies(tensors)) for _ in range(3)]
    if any(one.data_ptr() == other.data_ptr() != 0 for one, other in zip(runs[0], runs[1], strict=True)):
        return False  # a constant, which the caller may write to
    return all(_same_bits(one, other) for run in runs for one, other in zip(wanted, run, strict=True))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (
        one.is_inference() != other.is_inference()
        or one.dtype != other.dtype
        or one.shape != other.shape
        or one.stride() != other.stride()
    ):
        return False
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)) and torch.equal(one.isnan(), other.isnan())
