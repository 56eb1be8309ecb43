"""The plan of mode fx: decisions about a prepared graph that conversion follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from qat_lightning.graph.example import Example
from qat_lightning.graph.portable_graph import HoldsGraphs
from qat_lightning.modes.fx import pads, passes
from qat_lightning.modes.fx.divisors import leave_divisors_unrounded
from qat_lightning.modes.fx.float_sums import leave_sums_unrounded
from qat_lightning.modes.fx.grids import one_grid_where_kernels_keep_it
from qat_lightning.modes.fx.products import quantize_products, selected_scopes
from qat_lightning.modes.fx.relus import observe_only_after_relu
from qat_lightning.modes.fx.weights import weights_from_inputs
from qat_lightning.modes.qconfig import make_qconfig
from qat_lightning.settings.recipe import Recipe


@dataclass
class FxPlan(HoldsGraphs):
    """What conversion needs from a prepared network besides its layers.

    Attributes:
        graph: The graph from upstream's prepare, with ReLU6 folded.
        meta: Upstream's metadata of it.
        float_ops: Names of nodes that upstream would try to lower but cannot, because they take a number that forward
            computes, a tensor where kernels take numbers, or an argument that no kernel takes.
        dropped: Names of nodes that the int8 graph omits: dropout, and ReLU6, which is replaced by the output range of
            the op before it.
        scopes: The module whose ``forward`` created each node, by the node's name.
        products: Names of products that upstream would leave float.
        divisors: Names of nodes that are not rounded because they are divisors.
        sums: Names of nodes that are not rounded because only float ops read them.
        tables: Why tables of embeddings stay float, by the names of the layers.
    """

    graph: fx.Graph
    meta: dict[str, Any]
    float_ops: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    scopes: dict[str, str] = field(default_factory=dict)
    products: list[str] = field(default_factory=list)
    divisors: list[str] = field(default_factory=list)
    sums: list[str] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)


def make_plan(
    prepared: fx.GraphModule,
    network: nn.Module,
    example: Example,
    recipe: Recipe,
    scopes: dict[str, Any],
    *,
    prefix: str,
) -> tuple[FxPlan, list[str]]:
    """Decide which values are rounded on which grid, and which stay float.

    Args:
        prepared: The result of upstream's prepare; graph and ranges are changed.
        network: The float network.
        example: One call of it.
        recipe: Recipe with the selection and the backend.
        scopes: The module whose ``forward`` created each node, in upstream's form.
        prefix: The network's name in the LightningModule.

    Returns:
        The plan, and the names of roundings that training omits because an earlier one has the same effect.
    """
    qconfig, selects = make_qconfig(recipe), selected_scopes(recipe, prefix)
    pads.observe_behind_infinite_pads(prepared)
    divisors = leave_divisors_unrounded(prepared)
    sums = leave_sums_unrounded(prepared) if "sums" in recipe.families else set()
    broadcast = "products" in recipe.families
    products = quantize_products(
        prepared, network, example, scopes, selects, qconfig, divisors | sums, broadcast=broadcast
    )
    passes.refuse_late_writes(prepared, network, example, scopes)
    plan = FxPlan(prepared.graph, prepared.meta)
    plan.products, plan.divisors = products, [node.name for node in divisors]
    plan.sums = [node.name for node in sums]
    plan.scopes = {name: scope[0] for name, scope in scopes.items()}
    plan.float_ops = passes.round_tensors_only(prepared, network, example)
    plan.float_ops += weights_from_inputs(prepared) + passes.with_own_grids(prepared)
    plan.float_ops += passes.scaled_sums(prepared.graph)
    one_grid_where_kernels_keep_it(prepared)
    plan.dropped = observe_only_after_relu(prepared)
    if recipe.target.engine == "qnnpack":
        left = passes.clamps(prepared.graph, dict(prepared.named_modules(remove_duplicate=False)))
        plan.float_ops += [name for name in left if name not in plan.dropped]
    dropouts, behind_dropout = passes.observe_only_before_dropout(prepared)
    plan.dropped += dropouts
    return plan, behind_dropout
