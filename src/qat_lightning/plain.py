"""The library without Lightning: networks in, networks out, for a training loop of your own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConfigurationError
from qat_lightning.export.conversion import int8_of
from qat_lightning.graph.example import Example, example_of
from qat_lightning.graph.lazy import refuse_lazy
from qat_lightning.graph.training_flags import parts_keep_training
from qat_lightning.modes.layer_schemes import check_overrides_of
from qat_lightning.modes.left_float import leaving_float
from qat_lightning.modes.prepared import is_prepared, prepared_state
from qat_lightning.modes.registry import mode_for
from qat_lightning.rehearsal.faults import quantize_what_can_be
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.recipe import Recipe

Call: TypeAlias = Example | Tensor | Sequence[Any] | Mapping[str, Any]
"""One call of a network: an `Example`, the only input, positional inputs, or keyword inputs."""


def prepare(network: nn.Module, example: Call, recipe: Recipe) -> nn.Module:
    """Insert fake-quantization into a network, to train or calibrate it.

    Args:
        network: The float network, on the CPU. Some modes change it, so continue with the returned module.
        example: One call of it, with a batch of 2 or more samples: an `Example`, a tuple of positional inputs, a
            mapping of keyword inputs, or one tensor.
        recipe: Mode, backend, scheme, kind and choice of layers: ``"qat"`` to train, ``"static"`` to calibrate, and the
            other kinds to train, whether or not it says ``trained=True``.

    Returns:
        A module that is called, trained, moved and saved like ``network``, with the same parameters.

    Raises:
        ConfigurationError: A pattern of the scheme's overrides matches no layer.
        TraceError: The network cannot be captured in this mode.
        NetworkError: There is nothing in it to quantize, or it has lazy modules that were not called yet.

    Example:
        >>> import torch
        >>> x = torch.randn(16, 8)
        >>> prepared = prepare(nn.Sequential(nn.Linear(8, 4)), Example((x,)), Recipe("fx", "x86"))
        >>> optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
        >>> for _ in range(3):
        ...     loss = prepared(x).pow(2).mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> convert(prepared, Example((x,)))(x).shape
        torch.Size([16, 4])
    """
    _check_arguments(network, recipe)
    refuse_lazy(network)
    check_overrides_of({"": network}, recipe)
    with parts_keep_training(network) as keep:
        return keep(mode_for(recipe).prepare(network, example_of(example), recipe))


def convert(prepared: nn.Module, example: Call) -> QuantizedNetwork:
    """Convert a prepared network to int8 and verify it. Layers that cannot be int8 are left float in both.

    Args:
        prepared: A network from `prepare`, trained or calibrated.
        example: A real call, on which it is verified, in the forms of `prepare`.

    Returns:
        The int8 network on the CPU; its ``coverage`` lists what is int8, and why the rest is not.

    Raises:
        ConfigurationError: The network is not prepared.
        ConversionError: No range was observed, or conversion fails even with all layers float.
        NetworkError: No layer can be int8.
    """
    if not is_prepared(prepared):
        raise ConfigurationError(f"{type(prepared).__name__} was not prepared: give what prepare(...) returned.")
    _warn_of_detour(prepared_state(prepared).recipe)
    return int8_of(prepared, example_of(example), "convert")


def quantize(network: nn.Module, example: Call, recipe: Recipe) -> QuantizedNetwork:
    """Quantize a float network without training or calibration.

    Args:
        network: The float network; not changed.
        example: One call of it, in the forms of `prepare`.
        recipe: A recipe of kind ``"dynamic"`` or ``"weight_only"``.

    Raises:
        ConfigurationError: The recipe is of another kind, or the mode and backend do not support it.
        NetworkError: There is nothing to quantize, or the network has lazy modules that were not called yet.
        TraceError: The network cannot be captured in this mode.

    Example:
        >>> import torch
        >>> call = Example((torch.randn(8, 32),))
        >>> network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> [row.quantized for row in quantize(network, call, Recipe("eager", "x86", kind="dynamic")).coverage]
        [True, True]
    """
    _check_arguments(network, recipe)
    refuse_lazy(network)
    if recipe.kind not in DIRECT:
        raise ConfigurationError(
            f"kind={recipe.kind!r} needs ranges of activations, and quantize takes only {', '.join(DIRECT)}: "
            "prepared = prepare(network, example, recipe), calibrate(prepared, batches) or training, then "
            "convert(prepared, example)."
        )
    check_overrides_of({"": network}, recipe)
    _warn_of_detour(recipe)
    example = example_of(example)
    conversion = quantize_what_can_be(network, example, recipe)
    return QuantizedNetwork(
        conversion.converted, leaving_float(recipe, conversion.left_float, ""), example, source="the float network"
    )


def _check_arguments(network: Any, recipe: Any) -> None:
    """Check the types of arguments, which come in the order network, example, recipe."""
    if not isinstance(network, nn.Module):
        raise ConfigurationError(f"The network is a {type(network).__name__}: give an nn.Module as the first argument.")
    if not isinstance(recipe, Recipe):
        given = repr(recipe) if isinstance(recipe, str) else f"a {type(recipe).__name__}"
        raise ConfigurationError(
            f"The recipe is {given}: give a Recipe as the third argument, such as Recipe('fx', 'x86', kind='dynamic')."
        )


def _warn_of_detour(recipe: Recipe) -> None:
    if recipe.detour:
        warnings.warn(recipe.detour, stacklevel=3)
