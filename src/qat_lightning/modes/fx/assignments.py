"""Assignments to parts of a tensor in a trace: later readers of the tensor get a copy that contains them.

The result is the same unless another tensor shares the memory and is read later.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.fx.proxy import TraceError

_LOOKS = (getattr, "size", "dim", "numel")


class Assignments:
    """The assignments of one trace."""

    def __init__(self) -> None:
        self._others: dict[fx.Node, list[fx.Node]] = {}

    def note(self, written: fx.Node, made: fx.Node, values: dict[fx.Node, tuple[Any, ...]]) -> None:
        """Record an assignment.

        Args:
            written: The tensor that is assigned to.
            made: The node of the copy.
            values: The known values of each node so far.

        Raises:
            torch.fx.proxy.TraceError: It would modify an input or a tensor of the network.
        """
        sharing = [node for node, known in values.items() if _memory(known[0]) == _memory(values[written][0])]
        if any(node.op in ("placeholder", "get_attr") for node in sharing):
            raise TraceError("an assignment changes an input or a tensor of the network in place: clone it first")
        self._others[made] = [node for node in sharing if node is not made]

    def check(self, graph: fx.Graph) -> None:
        """Check the readers of modified tensors when the trace is complete.

        Raises:
            torch.fx.proxy.TraceError: A value that an assignment changes is read later through another tensor.
        """
        order = {node: number for number, node in enumerate(graph.nodes)}
        for made, others in self._others.items():
            for user in {user for node in others for user in node.users}:
                if order[user] > order[made] and user.target not in _LOOKS:
                    raise TraceError(
                        f"an assignment changes what {user.name!r} reads afterwards through another tensor: assign to "
                        "a clone, or read the tensor that was assigned to"
                    )


def _memory(value: Any) -> Any:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
