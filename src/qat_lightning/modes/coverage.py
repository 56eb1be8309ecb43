"""Which layers with weights, and which ops between them, are int8, and why others are not.

Each mode has its own rows (`fx_coverage`, `eager_coverage`, `pt2e.coverage`); this is their common part.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from qat_lightning.graph.buffers import buffers_copied
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.modes.own_weights import PRODUCTS, ParameterUses, parameters_behind
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.recording import copy_of
from qat_lightning.modes.without_arithmetic import nested, on_a_copy, shapes
from qat_lightning.terminal import LiteralTable


@contextmanager
def in_single_products() -> Iterator[None]:
    """Within the block, split fused LSTM and attention ops into products, because fused ones are not counted."""
    mkldnn, fast = torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch.backends.mha.set_fastpath_enabled(fast)


def _flops_of_bilinear(first: Any, weight: Any, second: Any, *args: Any, **kwargs: Any) -> int:
    # Flattened to (batch, in1), (out, in1, in2) and (batch, in2): one product of three factors for each.
    return int(2 * first[0] * math.prod(weight))


def counter() -> FlopCounterMode:
    """A counter of products of matrices and tensors, by module and by op."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._trilinear: _flops_of_bilinear})


@dataclass(frozen=True)
class FloatRun:
    """The result of one run of a float network.

    Attributes:
        used: Names of the modules that it calls, or whose parameters it reads.
        flops: Floating point operations of each module; None if they could not be counted.
        custom: Weights that functions multiply by, by the custom module that holds them.
    """

    used: set[str]
    flops: dict[str, int] | None
    custom: Mapping[str, Sequence[str]]


def float_run(network: nn.Module, example: Example) -> FloatRun:
    """Run a float network, and record what it uses.

    Args:
        network: Not changed.
        example: The call.
    """
    try:
        return on_a_copy(network, lambda copied, context: _run(copied, context, example, counter()))
    except Exception as error:  # noqa: BLE001 - a custom op that breaks the counter must not fail the conversion
        warnings.warn(f"Multiply-accumulates were not counted: {type(error).__name__}: {error}", stacklevel=2)
        return on_a_copy(network, lambda copied, context: _run(copied, context, example, None))


def _run(
    network: nn.Module, context: AbstractContextManager[Any], example: Example, counted: FlopCounterMode | None
) -> FloatRun:
    called: set[str] = set()
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
    uses = ParameterUses(network)
    with in_single_products():
        run_apart(network, example, nested(context, counted or nullcontext(), uses))
    flops = None if counted is None else flops_by_module(network, counted)
    return FloatRun(called | uses.used, flops, uses.of_custom_modules())


def flops_by_module(network: nn.Module, counted: FlopCounterMode) -> dict[str, int]:
    """The counted operations of each module of a network, by name."""
    root = type(network).__name__
    counts = {name: sum(ops.values()) for name, ops in counted.get_flop_counts().items()}
    return {"" if name == root else name.removeprefix(f"{root}."): count for name, count in counts.items()}


@torch.no_grad()
def flops_of(node: fx.Node, values: Mapping[str, Any], root: nn.Module) -> int:
    """The floating point operations of one node of a graph.

    Args:
        node: The node.
        values: Values of the nodes before it, in a run of the graph.
        root: Holds the modules that the graph calls.
    """
    called = [root.get_submodule(str(node.target))] if node.op == "call_module" else []
    target: Any = called[0] if called else node.target

    def count(context: AbstractContextManager[Any]) -> int:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: copy_of(values[source.name]))
        function = getattr(args[0], target) if node.op == "call_method" else target
        with buffers_copied(*called), context, in_single_products(), counter() as counted:
            function(*(args[1:] if node.op == "call_method" else args), **kwargs)
        return int(counted.get_total_flops())

    try:
        return count(shapes())
    except Exception:  # noqa: BLE001 - if the error is the network's own, the run on values raises it again
        return count(nullcontext())


def macs_of(flops: int, example: Example) -> int | None:
    """Multiply-accumulates per sample; None for an op without any.

    Args:
        flops: Operations of the whole example, as counted by `torch.utils.flop_counter`: only convolutions and products
            of matrices, two per multiply-accumulate.
        example: Its first tensor has the batch dimension.
    """
    first = next((leaf for leaf in tree_leaves((example.args, example.kwargs)) if isinstance(leaf, Tensor)), None)
    batch = first.shape[0] if first is not None and first.dim() else 1
    return round(flops / 2 / max(1, batch)) or None


def is_float(value: Any) -> bool:
    """Whether a value is a float or quantized tensor."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_quantized)


def layers_with_macs(rows: Sequence[LayerCoverage], run: FloatRun, example: Example) -> list[LayerCoverage]:
    """Add multiply-accumulates to the rows of layers, from one call of the float network.

    Args:
        rows: One for each layer.
        run: Run of the float network.
        example: Its call.
    """
    if run.flops is None:
        return list(rows)
    return [replace(row, macs=macs_of(run.flops.get(row.name, 0), example)) for row in rows]


def merged(rows: Iterable[LayerCoverage]) -> list[LayerCoverage]:
    """Merge rows of equal ops in the same module, and count their calls."""
    counted: dict[tuple[str, str, bool, str], list[LayerCoverage]] = defaultdict(list)
    for row in rows:
        counted[row.name, row.kind, row.quantized, row.reason].append(row)
    return [
        replace(group[0], calls=sum(row.calls for row in group), macs=sum(row.macs or 0 for row in group) or None)
        for group in counted.values()
    ]


@dataclass(frozen=True)
class Operations:
    """Coverage of the ops of a graph.

    Attributes:
        rows: One for each op that computes, merged.
        weights: Why each tensor of the network that an op multiplies by stays float, empty if it is int8, by its name.
    """

    rows: list[LayerCoverage] = field(default_factory=list)
    weights: Mapping[str, str] = field(default_factory=dict)


def operations_of(graph: fx.Graph, found: Sequence[tuple[fx.Node, LayerCoverage]]) -> Operations:
    """The coverage of ops, from the nodes of a graph with their rows."""
    weights: dict[str, str] = {}
    behind = parameters_behind(graph)
    for node, row in found:
        if row.macs or row.kind in PRODUCTS:
            for name in set().union(*(behind.get(source, ()) for source in node.all_input_nodes)):
                weights[name] = weights.get(name) or row.reason
    return Operations(merged(row for _, row in found), weights)


def int8_share(rows: Iterable[LayerCoverage]) -> float | None:
    """The share of a network's multiply-accumulates that is in int8, from 0 to 1; None if none were counted.

    Example:
        >>> rows = [
        ...     LayerCoverage("a", "Conv2d", True, macs=900),
        ...     LayerCoverage("b", "Linear", False, "excluded", macs=100),
        ... ]
        >>> int8_share(rows)
        0.9
    """
    rows = list(rows)
    total = sum(row.macs or 0 for row in rows)
    return sum(row.macs or 0 for row in rows if row.quantized) / total if total else None


def under(prefix: str, rows: Iterable[LayerCoverage]) -> list[LayerCoverage]:
    """Return rows with names relative to the LightningModule, as settings have them.

    Example:
        >>> [row.name for row in under("net", [LayerCoverage("0", "Linear", True), LayerCoverage("", "Net", False)])]
        ['net.0', 'net']
    """
    return [replace(row, name=join(prefix, row.name)) for row in rows]


def coverage_table(
    rows: Iterable[LayerCoverage], *, title: str = "", weight_bits: Callable[[str], int] = lambda name: 8
) -> Table:
    """Format coverage as a table: which layers and ops are int8, and which stayed float and why.

    Args:
        rows: ``qat.coverage``, or ``[*quantized.coverage, *quantized.operations]``.
        title: Title of the table.
        weight_bits: The bits of the weight of an int8 layer, by its name; other bits than 8 are shown.

    Returns:
        A table for `rich.print`.

    Example:
        >>> rows = [
        ...     LayerCoverage("a", "Conv2d", True, macs=900),
        ...     LayerCoverage("b", "Linear", False, "excluded", macs=100),
        ... ]
        >>> table = coverage_table(rows)
        >>> table.row_count, table.caption
        (2, 'int8: 1 of 1 Conv2d, 0 of 1 Linear; 90.0 % of the multiply-accumulates')
    """
    rows = list(rows)
    groups: dict[tuple[bool, str, str, str, int], list[LayerCoverage]] = defaultdict(list)
    for row in rows:
        bits = weight_bits(row.name) if row.quantized and row.what == "layer" else 8
        groups[row.quantized, row.what, row.kind, row.reason, bits].append(row)
    total = sum(row.macs or 0 for row in rows)
    table = LiteralTable(title=title or None, caption=_caption(rows), caption_justify="left", title_justify="left")
    for column in ("", "kind", "count", "MACs", "where", "why float"):
        table.add_column(column, justify="right" if column in ("count", "MACs") else "left", overflow="fold")
    for (quantized, what, kind, reason, bits), group in sorted(
        groups.items(), key=lambda item: (not item[0][0], item[0][1:])
    ):
        macs = sum(row.macs or 0 for row in group)
        table.add_row(
            "float" if not quantized else "int8" if bits == 8 else f"int8 (int{bits} weights)",
            kind if what == "layer" else f"{kind} (op)",
            str(sum(row.calls for row in group)),
            f"{macs / total:.1%}" if macs and total else "",
            _names(group),
            reason,
        )
    return table


def _names(group: Sequence[LayerCoverage]) -> str:
    names = [row.name or "the network" for row in group]
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


def _caption(rows: Sequence[LayerCoverage]) -> str:
    kinds = dict.fromkeys(row.kind for row in rows if row.what == "layer")
    counts = [
        f"{sum(row.quantized for row in rows if row.what == 'layer' and row.kind == kind)} of "
        f"{sum(row.what == 'layer' and row.kind == kind for row in rows)} {kind}"
        for kind in kinds
    ]
    share = int8_share(rows)
    return f"int8: {', '.join(counts)}" + (
        "" if share is None else f"; {share * 100:.1f} % of the multiply-accumulates"
    )


def report(find: Callable[[], Operations]) -> Operations:
    """The result of ``find``, or no rows and a warning: a failing report must not stop anything else."""
    try:
        return find()
    except Exception as error:  # noqa: BLE001
        warnings.warn(f"There is no report of the ops: {type(error).__name__}: {error}", stacklevel=2)
        return Operations()
