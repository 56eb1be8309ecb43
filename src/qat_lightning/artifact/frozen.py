"""An int8 graph without the Python between its ops: frozen traces, which a network makes of itself when called again.

Int8 kernels are so quick that what Python does between them takes longer than they do. `TorchScript
<https://docs.pytorch.org/docs/stable/generated/torch.jit.freeze.html>`_ runs the same kernels on the same packed
weights without it. A trace is of one form of inputs (structure, shapes, strides, dtypes and plain values), so that
nothing that forward decides by these is fixed for others.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat_lightning.artifact.operations import words

CALLS_BEFORE = 4
"""How many calls of a form run as they are: who calls a few times pays for no trace."""
_FORMS = 8
"""Of how many forms traces are kept."""
_COUNTED = 64
"""Of how many forms calls are counted at a time."""
_CHANGES = 3
"""After how many changes of its modules a network is traced no more."""
_OURS = frozenset({"torch", "torchao", "qat_lightning", "operator", "_operator"})
"""Where functions come from whose names say what they do."""
_FIXED = words(
    """
    abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d add
    add_relu addmm amax amin avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bmm cat cat_relu channel_shuffle chunk
    clamp clip clone concat contiguous conv1d conv1d_relu conv2d conv2d_relu conv3d conv3d_relu cos cumsum dequantize
    div einsum elu embedding eq exp expand expand_as flatten flip float gather ge gelu getitem
    group_norm gt hardsigmoid hardswish hardtanh index_select instance_norm interpolate layer_norm le leaky_relu linear
    linear_dynamic linear_relu log_softmax logical_and logical_not logical_or lt masked_fill matmul max_pool1d
    max_pool2d max_pool3d maximum mean minimum mish movedim mul mul_relu narrow ne neg normalize pad permute
    pixel_shuffle pixel_unshuffle pow quantize_per_tensor relu relu6 repeat reshape reshape_as rms_norm roll rsqrt
    scaled_dot_product_attention select selu sigmoid silu sin softmax softplus split sqrt squeeze stack sub sum
    swapaxes t tanh to transpose tril triu truediv type_as unbind unflatten unsqueeze view view_as where
    """
)
"""Names of functions that decide nothing by what is in a tensor, draw nothing by chance, write into nothing, and are
given no sizes of tensors: what TorchScript's tracer notes of those outlives a trace that fails."""
_LAYERS = (
    "torch.ao.nn.",
    *(
        f"torch.nn.modules.{name}"
        for name in words(
            "activation batchnorm container conv dropout flatten linear normalization padding pixelshuffle pooling"
        )
    ),
    "qat_lightning.modes.graph_network",
)
"""Where the layers are from that do nothing else either."""
_TRAINED = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
"""Layers that draw by chance, or keep statistics, in training."""
_LEFT_OUT = (nn.MultiheadAttention, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_PLAIN = (bool, int, float, str, type(None))

Frozen = Callable[..., Any]
Held = list[dict[Any, Any]]


class FrozenCalls:
    """Decides for each call of a network whether a frozen trace runs in its place, and makes the traces.

    A trace is kept if it gives the same bits, three times over. It is left out wherever something looks at the network
    or changes it: a hook on a module, an attribute that was set, a weight that was written to, another network,
    another tracer or compiler, a mode of torch's, autocast.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, int] = {}
        self._made: dict[Any, Frozen | None] = {}
        self._state: _State | None = None
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
        if self._changes > _CHANGES or self._is_graph is False or _is_watched():
            return network(*args, **kwargs)
        leaves, key = _form(args, kwargs)
        if key is None:
            return network(*args, **kwargs)
        if self._state is not None and not self._state.holds(network):
            self._changes += 1
            self._seen, self._made, self._state, self._is_graph = {}, {}, None, None
        frozen = self._made.get(key)
        if frozen is None:
            return self._as_it_is(network, key, args, kwargs)
        try:
            return frozen(*leaves)
        except Exception:  # noqa: BLE001 - what a graph refuses is said by itself, and not by TorchScript
            return network(*args, **kwargs)

    def _as_it_is(self, network: nn.Module, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if key in self._made or len(self._made) >= _FORMS:
            return network(*args, **kwargs)
        if len(self._seen) > _COUNTED:
            self._seen = {}
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= CALLS_BEFORE or _has_hooks(network):
            return network(*args, **kwargs)
        if self._is_graph is None:
            self._is_graph = is_graph(network)
        if not self._is_graph:
            return network(*args, **kwargs)
        given: Any = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        result = network(*args, **kwargs)
        if self._state is None:
            self._state = _State(network)
        self._made[key] = freeze(network, given[0], given[1], result)
        self._seen.pop(key)
        return result


def is_graph(network: nn.Module) -> bool:
    """Whether all that a network runs is a graph of torch's layers and of functions that are known to be fixed.

    Nothing of it is code of the user's, looks at what is in a tensor, draws by chance or writes into a tensor.

    Example:
        >>> is_graph(nn.Linear(2, 2))
        False
    """
    graph = network.__dict__.get("graph")
    if not isinstance(graph, torch.fx.Graph) or getattr(network, "sizes", None) is not None:
        return False  # for other sizes it would make itself anew within the trace
    return all(map(_is_fixed, graph.nodes)) and all(map(_is_fixed_layer, network.modules()))


def _is_fixed_layer(module: nn.Module) -> bool:
    if not type(module).__module__.startswith(_LAYERS) or (module.training and isinstance(module, _TRAINED)):
        return False
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)):
        sizes: Any = module.output_size
        return sizes is not None and (isinstance(sizes, int) or None not in sizes)
    return not isinstance(module, _LEFT_OUT)


def _is_fixed(node: torch.fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return True
    target: Any = node.target
    if isinstance(target, str):
        return target in _FIXED
    home = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    name = target.__name__.partition(".")[0]
    if name == "getitem" and any(isinstance(part, torch.fx.Node) for part in pytree.tree_leaves(node.args[1])):
        return False
    return name in _FIXED and home in _OURS and "out" not in node.kwargs


def freeze(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Frozen | None:
    """A frozen trace of a network for inputs of one form, called with their tensors; None if there can be none.

    Args:
        network: For which `is_graph` holds.
        args: A call of it; its tensors are copied.
        kwargs: Likewise.
        result: What that call gives.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    results, structure = pytree.tree_flatten(result)
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in results):
        return None  # a number or an object would be that of this one call
    given = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    computed = [place for place, leaf in enumerate(results) if isinstance(leaf, Tensor)]

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_unflatten(_put(leaves, given, tensors), spec)
        found = pytree.tree_leaves(network(*args, **kwargs))
        return tuple(found[place] for place in computed)

    tensors = tuple(leaves[place] for place in given)
    wanted = [results[place] for place in computed]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and constants in the trace are meant
        try:
            traced = torch.jit.trace(_Flat(network, flat), _copies(tensors), check_trace=False)
            # Without its numerics, which folds BatchNorm into float layers: the same bits are asked for.
            frozen = torch.jit.freeze(traced, optimize_numerics=False)
            if not _gives(frozen, tensors, wanted):
                return None
        except Exception:  # noqa: BLE001 - whatever TorchScript does not take runs as it is, and is none the worse
            return None
    if len(results) == 1 and structure.is_leaf():
        return lambda *tensors: frozen(*tensors)[0]
    empty: list[Any] = [None] * len(results)
    return lambda *tensors: pytree.tree_unflatten(_put(empty, computed, frozen(*tensors)), structure)


def _put(leaves: list[Any], places: list[int], tensors: tuple[Tensor, ...]) -> list[Any]:
    filled = list(leaves)
    for place, tensor in zip(places, tensors, strict=True):
        filled[place] = tensor
    return filled


def _copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in tensors)


class _Flat(nn.Module):
    """Flat tensors in and out, which is what TorchScript traces."""

    def __init__(self, network: nn.Module, flat: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.network = network
        self.__dict__["_flat"] = flat
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.__dict__["_flat"](*tensors)
        return result


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """The tensors of a call, and what a trace of it is for; None where it is for none."""
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:  # as most calls are, and several times quicker
        return [args[0]], _form_of(args[0])
    if not _is_nested(args) or not _is_nested(kwargs):
        return [], None
    leaves, spec = pytree.tree_flatten((args, kwargs))
    forms = [_form_of(leaf) for leaf in leaves]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, (spec, *forms) if tensors and None not in forms else None


def _form_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return None if leaf.device.type != "cpu" or leaf.is_quantized else (leaf.shape, leaf.stride(), leaf.dtype)
    return type(leaf), leaf.hex() if isinstance(leaf, float) else leaf  # 0.0 is not -0.0, and NaN is NaN


def _is_nested(value: Any) -> bool:
    """Whether a value is of tensors and plain values, in tuples, lists and dicts."""
    if type(value) in (tuple, list):
        return all(map(_is_nested, value))
    if type(value) is dict:
        return all(map(_is_nested, value.values()))
    return type(value) is Tensor or type(value) in _PLAIN


def _is_watched() -> bool:
    """Whether something follows what is computed, and must see every op."""
    return bool(
        torch._C._get_tracing_state()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    )


class _State:
    """What the modules of a network hold, to see afterwards what was set, replaced, written to or hooked into.

    Of modules that the graph does not call, only what they hold for those that it calls.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = weakref.ref(network)
        hooks = torch.nn.modules.module
        self.now: Held = [hooks._global_forward_hooks, hooks._global_forward_pre_hooks]
        graph: torch.fx.Graph = network.__dict__["graph"]
        called = {"", *(str(node.target) for node in graph.find_nodes(op="call_module"))}
        inside: set[nn.Module] = set()
        for name, module in network.named_modules(remove_duplicate=False):
            if name in called or module in inside:
                inside |= set(module.children()) if name else set()
                self.now += [module.__dict__, module._forward_hooks, module._forward_pre_hooks]
            self.now += [parts for parts in (module._modules, module._parameters, module._buffers) if parts]
        self.then = [dict(found) for found in self.now]
        tensors = [*network.parameters(), *network.buffers()]
        self.tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        self.versions = [tensor._version for tensor in self.tensors]

    def holds(self, network: nn.Module) -> bool:
        """Whether it is the same network, and nothing of it has changed."""
        if self.network() is not network or [tensor._version for tensor in self.tensors] != self.versions:
            return False
        try:
            return self.now == self.then
        except Exception:  # noqa: BLE001 - one tensor in place of another, which have no one truth value
            return False


def _has_hooks(network: nn.Module) -> bool:
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks) or any(
        module._forward_hooks or module._forward_pre_hooks for module in network.modules()
    )


def _gives(frozen: Any, tensors: tuple[Tensor, ...], wanted: list[Tensor]) -> bool:
    """Whether a trace gives the same bits, in memory of their own: as it is recorded, profiled and optimized."""
    runs = [frozen(*_copies(tensors)) for _ in range(3)]
    if any(one.data_ptr() == other.data_ptr() != 0 for one, other in zip(runs[0], runs[1], strict=True)):
        return False  # a constant, which whoever gets it may write to
    return all(_same_bits(one, other) for run in runs for one, other in zip(wanted, run, strict=True))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or one.stride() != other.stride():
        return False
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)) and torch.equal(one.isnan(), other.isnan())
