"""Transposed convolutions in the form that LiteRT has: without padding of the output, and cropped."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

_ATEN = torch.ops.aten
_TRANSPOSED = {_ATEN.conv_transpose1d.default: 1, _ATEN.conv_transpose2d.input: 2}
_POINTWISE = {
    _ATEN.relu.default,
    _ATEN.relu_.default,
    _ATEN.relu6.default,
    _ATEN.hardtanh.default,
    _ATEN.hardtanh_.default,
}
"""What a layer takes with it, so that its output is cropped behind them."""

_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_DEFAULTS = (None, 1, 0, 0, 1, 1)


def crop_transposed(graph_module: fx.GraphModule, examples: tuple[Tensor, ...]) -> None:
    """Rewrite transposed convolutions in place that LiteRT's converter does not take.

    It takes those whose padding is that of the same convolution the other way round, ``kernel - stride == 2 * padding``
    without ``output_padding``. Any other one is a transposed convolution without padding whose output is cropped, where
    the ``output_padding`` is not larger than the padding; the rest is left as it is.

    Args:
        graph_module: As `qat_lightning.export.pt2.flat_graph` gives it.
        examples: What it is called with.

    Example:
        >>> layer, x = torch.nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), torch.randn(1, 2, 4, 4)
        >>> graph_module = torch.export.export(layer, (x,)).module(check_guards=False)
        >>> crop_transposed(graph_module, (x,))
        >>> graph_module.graph.find_nodes(op="call_function", target=_ATEN.conv_transpose2d.input)[0].args[3:6]
        ((2, 2), (0, 0), (0, 0))
        >>> torch.allclose(graph_module(x), layer(x), atol=1e-6)
        True
    """
    found = [
        (node, dims)
        for target, dims in _TRANSPOSED.items()
        for node in graph_module.graph.find_nodes(op="call_function", target=target)
    ]
    if not found:
        return
    with torch.no_grad():
        ShapeProp(graph_module).propagate(*examples)
    sizes = [(_size(node, dims), _size(node.all_input_nodes[0], dims)) for node, dims in found]
    for (node, dims), (size, before) in zip(found, sizes, strict=True):
        _crop(node, dims, size, before)
    graph_module.recompile()


def _size(node: fx.Node, dims: int) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["tensor_meta"].shape[-dims:]
    return shape


def _crop(node: fx.Node, dims: int, sizes: tuple[int, ...], before: tuple[int, ...]) -> None:
    given = [*node.args[1:], *_DEFAULTS[len(node.args) - 2 :]]
    weight, bias, groups = given[0], given[1], given[5]
    stride, padding, extra, dilation = (_of_each(given[place], dims) for place in (2, 3, 4, 6))
    taken = True
    for size, other, step, pad, more in zip(sizes, before, stride, padding, extra, strict=True):
        kernel = size - (other - 1) * step + 2 * pad - more
        taken &= not more and (not pad or step == 1 or kernel - step == 2 * pad)
    if taken or any(more > pad for more, pad in zip(extra, padding, strict=True)):
        return
    none = (0,) * dims
    node.args = (node.args[0], weight, bias, stride, none, none, groups, dilation)
    for end in _ends(node):
        readers, cropped = list(end.users), end
        for axis, (pad, size) in enumerate(zip(padding, sizes, strict=True), start=-dims):
            with node.graph.inserting_after(cropped):
                cropped = node.graph.call_function(_ATEN.slice.Tensor, (cropped, axis, pad, pad + size))
        for reader in readers:
            reader.replace_input_with(end, cropped)


def _ends(node: fx.Node) -> list[fx.Node]:
    """Where what the kernel of a layer computes is to be read: behind its activation and its rounding."""
    while len(node.users) == 1 and (reader := next(iter(node.users))).target in _POINTWISE:
        node = reader
    readers = list(node.users)
    return list(readers[0].users) if len(readers) == 1 and readers[0].target is _QUANTIZE else [node]


def _of_each(value: Any, dims: int) -> tuple[int, ...]:
    """A size for each of the dimensions."""
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes
