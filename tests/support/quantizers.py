"""PT2E quantizers as users write them, with upstream's observers and nothing of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e.observer import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

aten = torch.ops.aten

_WEIGHTED = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)
_SHARING = (aten.flatten.using_ints, aten.max_pool2d.default, aten.relu.default)
_FIXED = {aten.sigmoid.default: (1 / 256, -128), aten.tanh.default: (1 / 128, 0)}


class OwnQuantizer(Quantizer):
    """Annotates convolutions, linear layers, moves of values after them, sigmoid and tanh; knows nothing of QAT.

    Args:
        dtype: Type of activations: ``"int8"``, ``"uint8"`` or ``"int16"``.
        symmetric: Whether activations have zero point 0.
        per_channel: Whether weights have a scale for each output channel.
        bias: Whether biases are int32 on a grid derived from those of input and weight.
    """

    def __init__(
        self, dtype: str = "int8", symmetric: bool = False, per_channel: bool = True, bias: bool = False
    ) -> None:
        scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
        self.activation = QuantizationSpec(getattr(torch, dtype), MinMaxObserver, qscheme=scheme)
        self.weight = QuantizationSpec(
            torch.int8,
            PerChannelMinMaxObserver if per_channel else MinMaxObserver,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
            ch_axis=0 if per_channel else None,
        )
        self.bias, self.dtype = bias, getattr(torch, dtype)

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate op by op."""
        for node in model.graph.find_nodes(op="placeholder"):
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(output_qspec=self.activation)
        for node in model.graph.nodes:
            if node.target in _WEIGHTED:
                self._annotate_weighted(node)
            elif node.target in _SHARING and Q_ANNOTATION_KEY in node.args[0].meta:
                edge = (node.args[0], node)
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                    {node.args[0]: self.activation}, SharedQuantizationSpec(edge)
                )
            elif node.target in _FIXED and self.dtype is torch.int8:
                scale, zero_point = _FIXED[node.target]
                spec = FixedQParamsQuantizationSpec(torch.int8, scale, zero_point, -128, 127)
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation({node.args[0]: self.activation}, spec)
        return model

    def _annotate_weighted(self, node: fx.Node) -> None:
        specs: dict[Any, Any] = {node.args[0]: self.activation, node.args[1]: self.weight}
        if self.bias and len(node.args) > 2 and node.args[2] is not None:
            per_channel = self.weight.ch_axis is not None
            specs[node.args[2]] = DerivedQuantizationSpec(
                derived_from=[(node.args[0], node), (node.args[1], node)],
                derive_qparams_fn=product_of_scales,
                dtype=torch.int32,
                quant_min=-(2**31),
                quant_max=2**31 - 1,
                qscheme=self.weight.qscheme,
                ch_axis=0 if per_channel else None,
            )
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(specs, self.activation)

    def validate(self, model: fx.GraphModule) -> None:
        """Accept everything."""


def product_of_scales(observers: list[Any]) -> tuple[Tensor, Tensor]:
    """The grid of the product of input and weight."""
    (input, _), (weight, _) = (observer.calculate_qparams() for observer in observers)
    scale = input * weight
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def wide_quantizer() -> OwnQuantizer:
    """A quantizer with 16-bit activations, created by a function."""
    return OwnQuantizer("int16", symmetric=True)


class Demanding(OwnQuantizer):
    """Requests unsupported settings.

    Args:
        what: ``"dynamic"``, ``"float16"``, ``"per_channel"``, ``"derived"`` or ``"int32"``.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        dtypes = {"float16": torch.float16, "int32": torch.int32}
        self.activation = QuantizationSpec(
            dtypes.get(what, torch.int8),
            MinMaxObserver,
            qscheme=torch.per_channel_affine if what == "per_channel" else torch.per_tensor_affine,
            ch_axis=1 if what == "per_channel" else None,
            is_dynamic=what == "dynamic",
        )
        self.what = what

    def _annotate_weighted(self, node: fx.Node) -> None:
        super()._annotate_weighted(node)
        if self.what == "derived":
            edge = (node.args[0], node)
            node.meta[Q_ANNOTATION_KEY].output_qspec = DerivedQuantizationSpec(
                derived_from=[edge, edge], derive_qparams_fn=product_of_scales, dtype=torch.int8
            )
