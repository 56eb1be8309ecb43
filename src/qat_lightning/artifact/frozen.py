"""An int8 graph without the Python between its ops: frozen traces, which a network makes of itself when called again.

Int8 kernels are so quick that what Python does between them takes longer than they do. `TorchScript
<https://docs.pytorch.org/docs/stable/generated/torch.jit.freeze.html>`_ runs the same kernels on the same packed
weights without it. A trace is of one form of inputs (structure, shapes, strides, dtypes and plain values), so that
nothing that forward decides by these is fixed for others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

CALLS_BEFORE = 4
"""How many calls of a form run as they are: who calls a few times pays for no trace."""
_FORMS = 8
"""Of how many forms traces are kept."""
_CHANGES = 3
"""After how many changes of its modules a network is traced no more."""

_OURS = frozenset({"torch", "torchao", "qat_lightning", "operator", "_operator", "math", "builtins"})
"""Where the code comes from that decides nothing by the values of tensors, and has no state but its modules'."""
_PLAIN = (bool, int, float, str, type(None))

Frozen = Callable[..., Any]
State = tuple[list[dict[Any, Any]], list[dict[Any, Any]]]


class FrozenCalls:
    """Decides for each call of a network whether a frozen trace runs in its place, and makes the traces.

    A trace is kept if it gives the same bits, three times over. It is left out wherever something looks at the network
    or changes it: a hook on a module, an attribute that was set, another tracer or compiler, a mode of torch's,
    autocast.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, int] = {}
        self._made: dict[Any, Frozen | None] = {}
        self._state: State = ([], [])
        self._changes = 0
        self._is_graph: bool | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenCalls:
        """A copy makes its own traces."""
        return FrozenCalls()

    def __reduce__(self) -> tuple[Any, ...]:
        """Likewise what comes out of a pickle."""
        return FrozenCalls, ()

    def run(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs of ``network``, from a trace where there is one."""
        if self._changes > _CHANGES or _is_watched():
            return network(*args, **kwargs)
        if self._is_graph is None:
            self._is_graph = is_graph(network)
        if not self._is_graph:
            return network(*args, **kwargs)
        leaves, key = _form(args, kwargs)
        if key is None:
            return network(*args, **kwargs)
        frozen = self._made.get(key)
        if frozen is not None:
            if _is_same(self._state):
                return frozen(*leaves)
            self._changes += 1
            self._seen, self._made, self._state, self._is_graph = {}, {}, ([], []), None
        elif key not in self._made and len(self._made) < _FORMS:
            seen = self._seen[key] = self._seen.get(key, 0) + 1
            if seen > CALLS_BEFORE and not _has_hooks(network):
                return self._freeze(network, key, args, kwargs)
        return network(*args, **kwargs)

    def _freeze(self, network: nn.Module, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: Any = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        result = network(*args, **kwargs)
        frozen = freeze(network, given[0], given[1], result)
        if not self._state[0]:
            self._state = _state_of(network)
        self._made[key] = frozen if frozen is not None and _gives(frozen, given, result) else None
        self._seen.pop(key, None)
        return result


def is_graph(network: nn.Module) -> bool:
    """Whether all that a network runs is a graph of torch's ops and layers: no code of the user's, which may decide.

    Example:
        >>> is_graph(nn.Linear(2, 2))
        False
    """
    graph = network.__dict__.get("graph")
    if not isinstance(graph, torch.fx.Graph):
        return False
    functions = (node.target for node in graph.nodes if node.op == "call_function")
    return all(_is_ours(type(module)) for module in network.modules()) and all(map(_is_ours, functions))


def _is_ours(code: Any) -> bool:
    return (getattr(code, "__module__", None) or "torch").partition(".")[0] in _OURS


def freeze(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Frozen | None:
    """A frozen trace of a network for inputs of one form, called with their tensors; None if there can be none.

    Args:
        network: Whose ``forward`` decides nothing by what is in a tensor.
        args: A call of it; its tensors are copied.
        kwargs: Likewise.
        result: What that call gives.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    results, structure = pytree.tree_flatten(result)
    if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in results):
        return None  # an object of its own, such as a cache, would be that of this one call
    given = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    computed = [place for place, leaf in enumerate(results) if isinstance(leaf, Tensor)]

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_unflatten(_put(leaves, given, tensors), spec)
        # In a trace sizes are tensors as well: what is one is known from the result.
        found = pytree.tree_leaves(network(*args, **kwargs))
        return tuple(found[place] for place in computed)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and constants in the trace are meant
        try:
            tensors = tuple(leaves[place].clone() for place in given)
            traced = torch.jit.trace(_Flat(network, flat).eval(), tensors, check_trace=False)
            # Without its numerics, which folds BatchNorm into float layers: the same bits are asked for.
            frozen = torch.jit.freeze(traced, optimize_numerics=False)
        except Exception:  # noqa: BLE001 - whatever TorchScript does not take runs as it is, and is none the worse
            return None
    if len(results) == 1 and structure.is_leaf():
        return lambda *tensors: frozen(*tensors)[0]
    return lambda *tensors: pytree.tree_unflatten(_put(results, computed, frozen(*tensors)), structure)


def _put(leaves: list[Any], places: list[int], tensors: tuple[Tensor, ...]) -> list[Any]:
    filled = list(leaves)
    for place, tensor in zip(places, tensors, strict=True):
        filled[place] = tensor
    return filled


class _Flat(nn.Module):
    """Flat tensors in and out, which is what TorchScript traces."""

    def __init__(self, network: nn.Module, flat: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.network = network
        self.__dict__["_flat"] = flat

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.__dict__["_flat"](*tensors)
        return result


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """The tensors of a call, and what a trace of it is for; None where it is for none."""
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:  # as most calls are, and several times quicker
        x = args[0]
        return [x], (x.shape, x.stride(), x.dtype) if x.device.type == "cpu" else None
    leaves, spec = pytree.tree_flatten((args, kwargs))
    key: list[Any] = [spec]
    tensors = []
    for leaf in leaves:
        if type(leaf) is Tensor and leaf.device.type == "cpu":
            tensors.append(leaf)
            key.append((leaf.shape, leaf.stride(), leaf.dtype))
        elif isinstance(leaf, _PLAIN):
            key.append((type(leaf), leaf))
        else:
            return [], None
    return tensors, tuple(key) if tensors else None


def _is_watched() -> bool:
    """Whether something follows what is computed, and must see every op."""
    return bool(
        torch._C._get_tracing_state()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    )


def _state_of(network: nn.Module) -> State:
    """What the modules hold, and a copy of it: what is set, replaced or hooked into afterwards differs.

    Of modules that the graph does not call, only what they hold for those that it calls.
    """
    held: list[dict[Any, Any]] = [
        torch.nn.modules.module._global_forward_hooks,
        torch.nn.modules.module._global_forward_pre_hooks,
    ]
    graph: torch.fx.Graph = network.__dict__["graph"]
    called = {"", *(str(node.target) for node in graph.find_nodes(op="call_module"))}
    inside: set[nn.Module] = set()
    for name, module in network.named_modules(remove_duplicate=False):
        if name in called or module in inside:
            inside |= set(module.children()) if name else set()
            held += [module.__dict__, module._forward_hooks, module._forward_pre_hooks]
        held += [parts for parts in (module._modules, module._parameters, module._buffers) if parts]
    return held, [dict(found) for found in held]


def _is_same(state: State) -> bool:
    try:
        return state[0] == state[1]
    except Exception:  # noqa: BLE001 - one tensor in place of another, which have no one truth value
        return False


def _has_hooks(network: nn.Module) -> bool:
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks) or any(
        module._forward_hooks or module._forward_pre_hooks for module in network.modules()
    )


def _gives(frozen: Frozen, given: Any, wanted: Any) -> bool:
    """Whether a trace gives the same bits: as it is recorded, profiled and optimized."""
    leaves = pytree.tree_leaves(given)
    for _ in range(3):
        got = frozen(*(leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)))
        if not _same_bits(wanted, got):
            return False
    return True


def _same_bits(one: Any, other: Any) -> bool:
    ours, spec = pytree.tree_flatten(one)
    theirs, found = pytree.tree_flatten(other)
    if spec != found:
        return False
    return all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        and torch.equal(a.isnan(), b.isnan())
        and a.dtype == b.dtype
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b) and a == b
        for a, b in zip(ours, theirs, strict=True)
    )
