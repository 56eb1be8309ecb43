"""ReLU fused into the rounding after it: the same values and gradients with fewer memory passes and less memory.

Rounding clamps to its grid anyway and is monotonic, so a ReLU before it only changes the limits of that clamp. Only the
executed graph is changed. The graph that is inspected, converted and verified keeps its ReLUs, and a module with a hook
is called as before.
"""

from __future__ import annotations

import copy
import inspect
import math
import types
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from qat_lightning.layers.operators import operator_of
from qat_lightning.layers.qat_modules import before_relu, has_relu_inside
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.grid import relu_up_to

aten = torch.ops.aten

_ASSIGNMENTS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}


def relu_limit(module: nn.Module | None, node: fx.Node | None = None) -> float | None:
    """The upper limit of a clamp to [0, limit]: inf for ReLU, 6 for ReLU6; None for anything else.

    Args:
        module: The called module; None for the function or method that ``node`` calls.
        node: The call.

    Example:
        >>> relu_limit(nn.ReLU6()), relu_limit(nn.GELU())
        (6.0, None)
    """
    if module is not None:
        if isinstance(module, nn.Hardtanh):  # ReLU6 is a Hardtanh
            return float(module.max_val) if module.min_val == 0 else None
        return math.inf if isinstance(module, nn.ReLU) else None
    if node is None or node.op not in ("call_function", "call_method"):
        return None
    row = operator_of(node.target)
    if row is not None and row.name == "hardtanh":
        low, high = (
            node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
            for position, name, default in ((1, "min_val", -1.0), (2, "max_val", 1.0))
        )
        return float(high) if low == 0 and isinstance(high, (int, float)) else None
    return None if row is None else row.relu_limit


def is_looked_at(*modules: nn.Module) -> bool:
    """Whether a hook would miss a call of one of these modules, or see another input than it would."""
    if torch.compiler.is_compiling():  # steps with hooks are not compiled
        return False
    return _has_any_global_hook() or any(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
        for module in modules
    )


def with_relus_in_roundings(network: nn.Module, graph: fx.Graph) -> fx.Graph:
    """The graph to execute for ``graph``: itself, or a copy with ReLUs fused into the roundings after them.

    Args:
        network: Holds the modules that the graph calls.
        graph: Not changed.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    found = {node.name: fused for node in graph.nodes if (fused := _fused(node, modules)) is not None}
    if not found:
        return graph
    graph = copy.deepcopy(graph)
    for node in list(graph.nodes):
        if node.name not in found:
            continue
        run, held = found[node.name]
        before = node.args[0]
        with graph.inserting_before(node):
            parts = [graph.get_attr(name) for name in (str(node.target), *held)]
            made = graph.call_function(run, (before.args[0], *parts))
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        graph.erase_node(before)
    return graph


def _fused(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[Callable[..., Tensor], tuple[str, ...]] | None:
    """For a rounding right after a ReLU: the function that computes both, and the other modules it needs."""
    if node.op != "call_module" or type(modules.get(str(node.target))) is not FakeQuantize or len(node.args) != 1:
        return None
    before = node.args[0]
    if not isinstance(before, fx.Node) or len(before.users) != 1 or not before.args:
        return None
    module = modules.get(str(before.target)) if before.op == "call_module" else None
    if module is not None and has_relu_inside(module):
        return _after_layer, (str(before.target),)
    largest, x = relu_limit(module, before), before.args[0]
    if largest is None or not isinstance(x, fx.Node):
        return None
    if len(x.users) > 1 and writes_in_place(before, module):
        return None  # the other readers need the output of ReLU in its input
    return (_after_function(largest), ()) if module is None else (_after_module(largest), (str(before.target),))


def writes_in_place(node: fx.Node, module: nn.Module | None = None) -> bool:
    """Whether a call modifies its input in place and returns it: by its name (``relu_``, ``+=``) or by a flag.

    Args:
        node: The call.
        module: The called module; None for a function or method.

    Example:
        >>> graph = fx.Graph()
        >>> writes_in_place(graph.call_method("relu_", (graph.placeholder("x"),)))
        True
    """
    if node.op == "call_module":
        return type(module).__module__.startswith("torch.") and bool(getattr(module, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.partition(".")[0]  # without the operator's overload
    if name in _ASSIGNMENTS or (name.endswith("_") and not name.endswith("__")):
        return True
    if not isinstance(node.target, types.FunctionType):
        return False  # no other operator has a flag for it
    given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    return given.arguments.get("inplace") is True


def _after_layer(x: Tensor, fq: FakeQuantize, layer: nn.Module) -> Tensor:
    """Round the output of a layer with a fused ReLU."""
    rounded: Tensor = fq(layer(x)) if is_looked_at(fq, layer) else fq(before_relu(layer, x), relu=math.inf)
    return rounded


def _after_module(largest: float) -> Callable[[Tensor, FakeQuantize, nn.Module], Tensor]:
    def round_relu(x: Tensor, fq: FakeQuantize, relu: nn.Module) -> Tensor:
        rounded: Tensor = fq(relu(x)) if is_looked_at(fq, relu) else fq(x, relu=largest)
        return rounded

    return round_relu


def _after_function(largest: float) -> Callable[[Tensor, FakeQuantize], Tensor]:
    def round_relu(x: Tensor, fq: FakeQuantize) -> Tensor:
        rounded: Tensor = fq(relu_up_to(x, largest)) if is_looked_at(fq) else fq(x, relu=largest)
        return rounded

    return round_relu
