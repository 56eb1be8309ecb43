"""The layout in memory in which attention that is written out returns its output while it trains."""

from __future__ import annotations

from torch import nn

from qat_lightning.graph.scopes import join, unused_path
from qat_lightning.layers.transformer import PositionsFirst, WrittenAttention
from qat_lightning.modes.fx.passes import is_fake_quantize
from qat_lightning.modes.fx.train_and_eval import set_module
from qat_lightning.modes.graph_network import GraphNetwork


def lay_out_as_torch(result: GraphNetwork, network: nn.Module) -> None:
    """Lay out the outputs of attention as torch's own modules do, on which the masks of later dropout depend.

    Only the graph that trains is changed; the one that is converted is not.

    Args:
        result: The network that trains.
        network: The float network, within `written_out`.
    """
    modules = dict(result.named_modules(remove_duplicate=False))
    for name, module in network.named_modules(remove_duplicate=False):
        if not (isinstance(module, WrittenAttention) and module.batch_first):
            continue
        for node in result.graph.find_nodes(op="call_module", target=join(name, "out_proj")):
            output = node
            while len(output.users) == 1 and is_fake_quantize(user := next(iter(output.users)), modules):
                output = user
            path = unused_path(result, join(name, "_layout"))
            set_module(result, path, PositionsFirst().train(module.training))
            with result.graph.inserting_after(output):
                placed = result.graph.call_module(path)
            output.replace_all_uses_with(placed)
            placed.args = (output,)
    result.set_graph(result.graph)
