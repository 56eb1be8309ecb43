"""In-place writes to a tensor after it was rounded: the rounded tensor is a copy, which the write does not reach."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import fx, nn

from qat_lightning.numerics.fake_quantize import FakeQuantize


def late_write(
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    writes: Mapping[fx.Node, fx.Node],
    memory: Mapping[fx.Node, Hashable],
) -> tuple[fx.Node, fx.Node] | None:
    """Find the first write to the memory of a tensor between its rounding and a reader of the rounded tensor.

    Args:
        graph: A graph with fake-quant.
        modules: The modules that it calls.
        writes: The nodes that modify a tensor in place, and the node of that tensor.
        memory: For each tensor a key of its memory; a view has the key of its base.

    Returns:
        The tensor that is rounded, and the write; None if there is no such write.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    for write, written in writes.items():
        for node in graph.nodes:
            if node.op != "call_module" or not isinstance(modules.get(str(node.target)), FakeQuantize):
                continue
            source = node.args[0]
            if source not in memory or memory[source] != memory.get(written) or order[node] > order[write]:
                continue
            if any(order[reader] > order[write] for reader in node.users):
                return source, write
    return None


def late_write_error(mode: str, network: str, tensor: str, write: str) -> str:
    """The error message for a late write.

    Args:
        mode: The mode that found it.
        network: The network's class.
        tensor: The tensor that is rounded.
        write: The writing op, and its line.
    """
    return (
        f"mode={mode!r} cannot round {tensor!r} in {network}: {write} overwrites it later through a view, and it is "
        "read again after that. What to do: compute the new value out of place and read that one, or use mode='eager' "
        "or mode='auto'."
    )
