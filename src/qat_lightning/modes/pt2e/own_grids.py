"""The grids that a quantizer requests, as our FakeQuantizes: for quantizers that do not follow our scheme.

A quantizer describes grids by specs: integers, their limits, symmetric or affine, per tensor or per channel, shared,
fixed or derived. All of that is kept, except the observers: ranges of activations are observed, frozen and verified as
in all modes, ranges of weights are those of the current weights, and there is one formula for scale and zero point. So
it does not matter whether a quantizer was made for QAT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize
from torchao.quantization.pt2e.observer import FixedQParamsObserver, ObserverBase
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from qat_lightning.errors import ConfigurationError
from qat_lightning.modes.layer_schemes import coarser
from qat_lightning.modes.pt2e.dtypes import leave_unselected
from qat_lightning.modes.pt2e.quantizers import Constructor
from qat_lightning.modes.qconfig import activation_settings, weight_settings
from qat_lightning.numerics.derived import DerivedFakeQuantize
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe

INTEGERS = (torch.int8, torch.uint8, torch.int16)
"""Integers that float32 arithmetic can round to, and that runtimes store."""

_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
_QSCHEMES = (torch.per_tensor_affine, torch.per_tensor_symmetric, *_PER_CHANNEL)

Place = Any
"""The place of a spec: a node's output, or an edge as (source, user)."""


def take_over(graph: fx.Graph, recipe: Recipe, selects: Callable[[fx.Node], bool]) -> None:
    """Insert our FakeQuantize into every spec of an annotated graph.

    Args:
        graph: The graph annotated by the quantizer; the annotations are changed.
        recipe: Recipe with the observers, and with settings that make grids coarser.
        selects: Whether the code that created a node is to be quantized; otherwise the node loses its annotation.

    Raises:
        ConfigurationError: A spec requests something unsupported; the message names the op.
    """
    leave_unselected(graph, selects)
    observed = _observed(graph)
    for node in graph.nodes:
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is None:
            continue
        annotation.input_qspec_map = {
            source: _ours(spec, (source, node), (source, node) not in observed, recipe)
            for source, spec in annotation.input_qspec_map.items()
        }
        annotation.output_qspec = _ours(annotation.output_qspec, node, node not in observed, recipe)


def _places(graph: fx.Graph) -> dict[Place, QuantizationSpecBase]:
    found: dict[Place, QuantizationSpecBase] = {}
    for node in graph.nodes:
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is None:
            continue
        found |= {(source, node): spec for source, spec in annotation.input_qspec_map.items() if spec is not None}
        if annotation.output_qspec is not None:
            found[node] = annotation.output_qspec
    return found


def _observed(graph: fx.Graph) -> set[Place]:
    """The places whose values depend on the input, and those that share a range with one of them."""
    depends = set[fx.Node]()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in depends for source in node.all_input_nodes):
            depends.add(node)
    places = _places(graph)
    found = {place for place in places if (place[0] if isinstance(place, tuple) else place) in depends}
    while True:
        shares = {spec.edge_or_node for place in found if isinstance(spec := places.get(place), SharedQuantizationSpec)}
        shared = {
            place
            for place, spec in places.items()
            if isinstance(spec, SharedQuantizationSpec) and spec.edge_or_node in found
        }
        if shares | shared <= found:
            return found
        found |= shares | shared


def _ours(spec: Any, place: Place, constant: bool, recipe: Recipe) -> Any:
    """A spec with our FakeQuantize instead of its observer."""
    if spec is None or isinstance(spec, SharedQuantizationSpec):
        return spec
    if isinstance(spec, DerivedQuantizationSpec):
        if not constant:
            raise _impossible(
                place, recipe, ("derives the grid of an activation from other grids"), "give it one of its own"
            )
        return spec
    _check_grid(spec, place, recipe)
    if isinstance(spec, FixedQParamsQuantizationSpec):
        return replace(spec, **_limits(spec))
    assert isinstance(spec, QuantizationSpec)
    _check_observed(spec, place, constant, recipe)
    return _narrowed(spec, constant, recipe)


def _check_grid(spec: Any, place: Place, recipe: Recipe) -> None:
    if not isinstance(spec, (QuantizationSpec, FixedQParamsQuantizationSpec)):
        raise _impossible(place, recipe, f"gives a {type(spec).__name__}", "use one of torchao's five specs")
    if spec.is_dynamic:
        raise _impossible(
            place,
            recipe,
            "requests ranges that are computed in each call (is_dynamic=True)",
            "use is_dynamic=False, or backend='x86' with kind='dynamic'",
        )
    if spec.dtype not in INTEGERS:
        raise _impossible(
            place,
            recipe,
            f"asks for {spec.dtype}",
            "use torch.int8, torch.uint8 or torch.int16; for a bias in int32 a DerivedQuantizationSpec, or None",
        )
    if spec.qscheme is not None and spec.qscheme not in _QSCHEMES:
        raise _impossible(place, recipe, f"asks for {spec.qscheme}", "use a scheme per tensor or per channel")


def _check_observed(spec: QuantizationSpec, place: Place, constant: bool, recipe: Recipe) -> None:
    if spec.qscheme in _PER_CHANNEL and not constant:
        raise _impossible(
            place, recipe, "requests one scale per channel of an activation", "use a scheme per tensor for activations"
        )
    made_by = spec.observer_or_fake_quant_ctr
    observer = getattr(getattr(made_by, "p", None), "func", made_by)
    if any(base.__name__ == "AffineQuantizedObserverBase" for base in getattr(observer, "__mro__", ())):
        raise _impossible(
            place, recipe, "requests one scale per block or group", "use an observer per tensor or per channel"
        )


def _limits(spec: Any) -> dict[str, int]:
    """The smallest and largest integer: as specified, or those of the dtype."""
    info = torch.iinfo(spec.dtype)
    return {
        "quant_min": info.min if spec.quant_min is None else spec.quant_min,
        "quant_max": info.max if spec.quant_max is None else spec.quant_max,
    }


def _narrowed(spec: QuantizationSpec, constant: bool, recipe: Recipe) -> QuantizationSpec:
    """A spec with our FakeQuantize, on a grid that the scheme can only make coarser."""
    scheme, limits = recipe.scheme, _limits(spec)
    qscheme = spec.qscheme if spec.qscheme is not None else torch.per_tensor_affine
    bits = scheme.weight_bits if constant else scheme.activation_bits
    low, high = coarser(limits["quant_min"], limits["quant_max"], bits, is_weight=constant)
    limits = {"quant_min": low, "quant_max": high}
    if constant and not scheme.per_channel and qscheme in _PER_CHANNEL:
        symmetric = qscheme is torch.per_channel_symmetric
        qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    if scheme.activation_symmetric and not constant:
        qscheme = torch.per_tensor_symmetric
    per_channel = qscheme in _PER_CHANNEL
    settings = weight_settings(recipe) if constant else activation_settings(recipe)
    return replace(
        spec,
        **limits,
        qscheme=qscheme,
        ch_axis=(spec.ch_axis or 0) if per_channel else None,
        observer_or_fake_quant_ctr=Constructor("PerChannelFakeQuantize" if per_channel else "FakeQuantize", **settings),
    )


def own_modules(prepared: fx.GraphModule, recipe: Recipe) -> None:
    """Replace upstream's observers of fixed and derived grids by our modules.

    Raises:
        ConfigurationError: The quantizer inserted its own observer, besides its annotations.
    """
    ours: dict[int, FakeQuantize] = {}
    observers = {name: module for name, module in prepared._modules.items() if isinstance(module, ObserverBase)}
    for name, module in observers.items():
        if isinstance(module, FixedQParamsObserver):
            ours.setdefault(id(module), _fixed(module))
            setattr(prepared, name, ours[id(module)])
        elif not isinstance(module, DerivedObserverOrFakeQuantize):
            raise ConfigurationError(
                f"backend={recipe.backend!r} inserted its own {type(module).__name__} in prepare_obs_or_fq_callback, "
                "whose range would not be trained: let it annotate the place instead."
            )
    for name, module in observers.items():
        if isinstance(module, DerivedObserverOrFakeQuantize):
            sources = [ours.get(id(source), source) for source in module.obs_or_fqs]
            grid = {key: getattr(module, key) for key in ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis")}
            setattr(prepared, name, DerivedFakeQuantize(sources, module.derive_qparams_fn, **grid))


def _fixed(module: FixedQParamsObserver) -> FakeQuantize:
    scale, zero_point = float(module.scale), int(module.zero_point)
    low, high = int(module.quant_min), int(module.quant_max)
    return FakeQuantize(
        dtype=module.dtype,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_affine,
        source="fixed",
        fixed_range=((low - zero_point) * scale, (high - zero_point) * scale),
    )


def _impossible(place: Place, recipe: Recipe, what: str, instead: str) -> ConfigurationError:
    node = place[1] if isinstance(place, tuple) else place
    where = f"{node.target}" if node.op == "call_function" else node.name
    return ConfigurationError(
        f"backend={recipe.backend!r} {what} at {where} ({node.name}), which cannot be trained here. What to do: in the "
        f"quantizer, {instead}; or leave the layer float with exclude=."
    )
