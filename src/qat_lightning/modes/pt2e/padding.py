"""Convolutions padded by name, in an exported graph: rewritten with numbers, which quantizers have rules for."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_BY_NAME = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def pad_by_numbers(graph: fx.Graph) -> None:
    """Write ``padding="same"`` and ``"valid"`` as numbers; the extra zero of an even kernel becomes a separate padding.

    Args:
        graph: An exported graph, with the example's shapes in its nodes; changed in place.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _BY_NAME:
            continue
        given: list[Any] = list(node.args)
        x, weight, bias, stride, padding, dilation, groups = given + [None, [1], "valid", [1], 1][len(given) - 2 :]
        kernel = weight.meta["val"].shape[2:]
        stride, spread = ([*given] * len(kernel) if len(given) == 1 else [*given] for given in (stride, dilation))
        totals = [d * (int(k) - 1) if padding == "same" else 0 for d, k in zip(spread, kernel, strict=True)]
        if any(total % 2 for total in totals):
            behind = [side for total in reversed(totals) for side in (0, total % 2)]
            with graph.inserting_before(node):
                padded = graph.call_function(aten.constant_pad_nd.default, (x, behind, 0.0))
            padded.meta = {key: value for key, value in node.meta.items() if key not in ("source_fn_stack", "torch_fn")}
            with x.meta["val"].fake_mode:
                padded.meta["val"] = aten.constant_pad_nd.default(x.meta["val"], behind, 0.0)
            x = padded
        node.target = _BY_NAME[node.target]
        node.args = (x, weight, bias, stride, [total // 2 for total in totals], spread, groups)
