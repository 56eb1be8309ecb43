"""Writing over a tensor after it was rounded: what rounding made of it is another tensor, which the write misses."""

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
    """The first write to the memory of a tensor between its rounding and a reader of what was rounded.

    Args:
        graph: With fake-quant.
        modules: What it calls.
        writes: The nodes that change a tensor in place, and which.
        memory: For each tensor what tells its memory from that of others; views have that of what they are views of.

    Returns:
        The tensor that is rounded, and the write; None if there is none.
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
    """What to say of it.

    Args:
        mode: In which it was found.
        network: Its class.
        tensor: What is rounded.
        write: What writes, and where.
    """
    return (
        f"mode={mode!r} cannot round {tensor!r} in {network}: {write} overwrites it later through a view, and it is "
        "read again after that. What to do: compute the new value out of place and read that one, or use mode='eager' "
        "or mode='auto'."
    )
