"""Products of two tensors that upstream's table lacks: fused attention, the operator ``@``, ``bmm``.

Each becomes ``torch.matmul`` between roundings, which has an int8 kernel and supports broadcasting. This happens after
upstream's prepare, and the new ranges have separate names: the numbers of all others stay as in releases that left
these products float, whose checkpoints still load, and leave them float.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import QConfig

from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.layers.operators import MOVES
from qat_lightning.modes.fx.attention import attention_of, products_of_attention, spread, yields_weights
from qat_lightning.modes.fx.config import shares_range
from qat_lightning.modes.fx.passes import evaluating_with_folded, is_part
from qat_lightning.modes.fx.product_sums import add_up, factors_of, sum_of
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.places import op_name
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.recording import Recorder, example_values
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe

ROUNDING = "product_rounding"
"""Prefix of the names of ranges that are created here."""

PRODUCT_NAMES = frozenset(
    {
        *("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger", "kron", "einsum", "tensordot"),
        *("addmm", "addmv", "addr", "addbmm", "baddbmm", "chain_matmul", "cdist", "matrix_power", "bilinear"),
        *("linalg_multi_dot", "linalg_vecdot", "linalg_matrix_power", "scaled_dot_product_attention"),
    }
)
"""Names of functions that multiply tensors and sum, whether or not mode fx supports them in int8."""

PRODUCTS = (operator.matmul, torch.bmm, "matmul", "bmm")


@torch.no_grad()
def quantize_products(
    prepared: fx.GraphModule,
    network: nn.Module,
    example: Example,
    scopes: dict[str, Any],
    selects: Callable[[str], bool],
    qconfig: QConfig,
    divisors: set[fx.Node],
    *,
    broadcast: bool = True,
) -> list[str]:
    """Round products that upstream left float, if their kernel supports them.

    Args:
        prepared: The result of upstream's prepare; changed in place.
        network: The float network.
        example: One call.
        scopes: Path and class of the module whose ``forward`` created each node; those of new nodes are added.
        selects: Whether computations in a module of this name are to be quantized.
        qconfig: Creates the FakeQuantizes.
        divisors: Divisors, which stay as they are.
        broadcast: Whether to include products that earlier releases left float: those that broadcast, with heads that
            share their keys, and with an addition.

    Returns:
        The names of these products.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    found = [
        node
        for node in prepared.graph.nodes
        if (
            (_is_product(node) or _is_attention(node, modules, broadcast) or (broadcast and sum_of(node)))
            and node not in divisors
            and selects(_scope(node, scopes))
        )
        or yields_weights(node, modules)
    ]
    if not found:
        return []
    with evaluating_with_folded(prepared, network):
        recorder = Recorder(prepared, prepared.graph)
        recorder.run(*example_values(prepared.graph, example))
    own = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    roundings, products = _Roundings(prepared, recorder.values, qconfig), list[fx.Node]()
    takes = functools.partial(_kernel_takes, own=own, broadcast=broadcast)
    for node in found:
        chosen = node not in divisors and selects(_scope(node, scopes))
        if _is_product(node):
            sources = [recorder.values[source.name] for source in node.all_input_nodes]
            if len(node.args) == 2 and len(sources) in (1, 2) and takes(sources[0], sources[-1]):
                node.op, node.target = "call_function", torch.matmul
                products.append(node)
            continue
        summed = sum_of(node)
        made, inside = (
            _with_attention(prepared, node, modules, recorder.values, takes, chosen, _scope(node, scopes))
            if summed is None
            else _with_sum(prepared.graph, node, summed, recorder.values, takes)
        )
        products += inside
        for new in made:
            scopes[new.name] = scopes.get(node.name, ("", None))
            roundings.configs[new.name] = qconfig
    for product in products:
        roundings.around(product)
    prepared.graph.lint()
    prepared.recompile()
    return [product.name for product in products]


def _with_attention(
    prepared: fx.GraphModule,
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    values: Mapping[str, Any],
    takes: Callable[[Any, Any], bool],
    chosen: bool,
    scope: str,
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Split attention if its products are to be int8, or no file can call it; returns new nodes and products."""
    given = attention_of(node, modules)
    assert given is not None
    possible = chosen and products_of_attention(given, values, takes)
    if not possible and not yields_weights(node, modules):
        return [], []
    made, both = spread(prepared, node, given, values, scope)
    return made, both if possible else []


def _with_sum(
    graph: fx.Graph,
    node: fx.Node,
    given: Mapping[str, Any],
    values: Mapping[str, Any],
    takes: Callable[[Any, Any], bool],
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Split a product with an addition, if the kernel supports the product."""
    if not takes(values[given["one"].name], values[given["two"].name]):
        return [], []
    with graph.inserting_before(node):
        before, one, two = factors_of(graph, node, given)
        product = graph.create_node("call_function", torch.matmul, (one, two), {}, name=f"{node.name}_product")
        made = [*before, product, *add_up(graph, given, product)]
    node.replace_all_uses_with(made[-1])
    graph.erase_node(node)
    return made, [product]


def selected_scopes(recipe: Recipe, prefix: str) -> Callable[[str], bool]:
    """Whether a module's computations between layers are to be quantized, by its name in the network."""

    def selects(scope: str) -> bool:
        return recipe.selects(join(prefix, scope)) if scope else not recipe.include

    return selects


def _is_product(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in PRODUCTS and not node.kwargs


def _is_attention(node: fx.Node, modules: Mapping[str, nn.Module], broadcast: bool) -> bool:
    given = attention_of(node, modules)
    return given is not None and (broadcast or not given.get("enable_gqa"))


def _scope(node: fx.Node, scopes: Mapping[str, Any]) -> str:
    return str(scopes[node.name][0]) if node.name in scopes else ""


def _kernel_takes(one: Any, other: Any, *, own: torch.dtype, broadcast: bool) -> bool:
    """Whether the int8 kernel supports two factors.

    Args:
        one: A factor.
        other: The other factor.
        own: The network's precision.
        broadcast: Whether leading dimensions may differ, as in releases that quantize such products.
    """
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype == own):
        return False
    if broadcast:
        # An outer product sums nothing. A grid could make its factors equal, such as positions.
        return one.ndim > 0 and other.ndim > 0 and one.shape[-1] > 1
    return one.ndim > 1 and one.ndim == other.ndim and one.shape[:-2] == other.shape[:-2]


class _Roundings:
    """Rounds factors and products; values that are on a grid already keep it.

    Args:
        prepared: The network; changed in place.
        values: Values of its nodes on the example.
        qconfig: Creates the FakeQuantizes.
    """

    def __init__(self, prepared: fx.GraphModule, values: Mapping[str, Any], qconfig: QConfig) -> None:
        self.prepared, self.values, self.qconfig = prepared, values, qconfig
        self.graph = prepared.graph
        self.configs = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
        self.device = next((p.device for p in prepared.parameters()), torch.device("cpu"))

    def around(self, product: fx.Node) -> None:
        """Round both factors of a product and the product."""
        self.configs[product.name] = self.qconfig
        for source in product.all_input_nodes:
            product.replace_input_with(source, self._rounded(source))
        movers, grid = self._grid_after(product)
        for node in (product, *movers):
            self._behind(node, grid)

    def _rounded(self, source: fx.Node) -> fx.Node:
        """The node that rounds a factor."""
        if self._is_rounding(source):
            return source
        there = next((user for user in source.users if self._is_rounding(user)), None)
        if there is not None:
            return there
        movers, before = [source], source
        while _moves(before) and isinstance(before.args[0], fx.Node):
            before = before.args[0]
            if self._is_rounding(before):
                for mover in reversed(movers):
                    if isinstance(self.values.get(mover.name, before), (Tensor, fx.Node)):
                        made = self._behind(mover, str(before.target))
                return made
            movers.append(before)
        return self._behind(source, self._new())

    def _grid_after(self, product: fx.Node) -> tuple[list[fx.Node], str]:
        """The grid that a product reaches via ops that only move it, and these ops; otherwise a new grid and no ops."""
        movers: list[fx.Node] = []
        node = product
        while len(node.users) == 1:
            (user,) = node.users
            if self._is_rounding(user):
                return movers[:-1], str(user.target)
            if not _moves(user) or user.args[0] is not node:
                break
            movers.append(user)
            node = user
        return [], self._new()

    def _behind(self, node: fx.Node, grid: str) -> fx.Node:
        """Round the output of ``node`` for all readers, including those of its shape."""
        rounding = next((user for user in node.users if self._is_rounding(user)), None)
        if rounding is None:
            with self.graph.inserting_after(node):
                rounding = self.graph.call_module(grid, (node,))
        else:
            node.append(rounding)  # it may come after other readers of the value
        node.replace_all_uses_with(rounding, delete_user_cb=lambda user: not self._is_rounding(user))
        return rounding

    def _is_rounding(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.prepared.get_submodule(str(node.target)), FakeQuantize)

    def _new(self) -> str:
        number = sum(name.startswith(ROUNDING) for name in self.prepared._modules)
        name = f"{ROUNDING}_{number}"
        self.prepared.add_module(name, self.qconfig.activation().to(self.device))
        return name


def _moves(node: fx.Node) -> bool:
    """Whether a node only moves values."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    return is_part(node.target) or (op_name(node.target) in MOVES and shares_range(node.target))


def follow_earlier_checkpoints(prepared: nn.Module) -> None:
    """Leave products float if a checkpoint of an earlier release is loaded, which left them float."""
    if any(name.startswith(ROUNDING) for name in prepared._modules):
        prepared.register_load_state_dict_pre_hook(_without_products)


def _without_products(prepared: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if f"{prefix}_quantization._extra_state" not in state_dict:
        return  # of a float network
    state = prepared_state(prepared)
    lacking = not any(key.startswith(f"{prefix}{ROUNDING}") for key in state_dict)
    if not lacking and _EARLIER not in state.left_float.values():
        return
    leave_float(prepared, dict.fromkeys(state.plan.products, _EARLIER), None)
    for name, module in prepared._modules.items():
        if name.startswith(ROUNDING) and isinstance(module, FakeQuantize):
            module.left_float = True
            if lacking:
                state_dict.update(module.state_dict(prefix=f"{prefix}{name}."))


_EARLIER = "the checkpoint is from a release that left this product float"
