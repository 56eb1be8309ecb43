"""Networks with peft adapters: which are refused, what they are merged into, and the names of their layers.

A layer with a merged adapter has the same name as without the adapter. Integer networks are made from the network
inside a ``PeftModel``, because the wrapper is no longer needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from qat_lightning.errors import NetworkError, VerificationError
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.layers.adapters import (
    has_adapters,
    inner_of,
    is_adapted,
    is_copy_in_training,
    is_lora,
    merge,
    running_copy,
    why_not_beside,
    why_unmerged,
)
from qat_lightning.modes.prepared import copy_of_modules
from qat_lightning.modes.protocol import Converted
from qat_lightning.settings.recipe import Recipe

STAYS_FLOAT = "adapters stay float with adapters='float'"


def refuse_adapters(network: nn.Module, recipe: Recipe) -> None:
    """Raise an error for adapters that cannot be trained or stored as the recipe says.

    Raises:
        NetworkError: There are such adapters; the message says what to use instead.
    """
    found = {name: module for name, module in network.named_modules() if is_adapted(module)}
    if not found:
        return
    if recipe.kind in ("qat", "static"):
        raise NetworkError(
            f"{type(network).__name__} has peft adapters (the first is {next(iter(found))!r}), which kind='static' "
            "neither trains nor merges: use kind='weight_only' or kind='dynamic', or give the network that "
            "merge_and_unload() returns."
        )
    if recipe.smoothquant is not None or recipe.equalization != "none" or recipe.rotation:
        raise NetworkError(
            f"{type(network).__name__} has peft adapters, whose base weights must not change: use smoothquant=None, "
            "rotation=False and equalization='none', or give the network that merge_and_unload() returns."
        )
    beside = recipe.adapters == "float"
    why_not = why_not_beside if beside else why_unmerged
    reasons = {name: why for name, module in found.items() if (why := why_not(module))}
    if reasons:
        name, why = next(iter(reasons.items()))
        possible = not beside and not any(map(why_not_beside, found.values()))
        raise NetworkError(
            f"{len(reasons)} of the adapters of {type(network).__name__} cannot be "
            f"{'float beside' if beside else 'merged into'} quantized weights (the first is {name!r}): {why}."
            + (" Or use adapters='float', which quantizes only the base weights." if possible else "")
        )


def whole(network: nn.Module, recipe: Recipe) -> nn.Module:
    """The network as it is stored: if the recipe says so, adapters are merged in a copy of its modules."""
    if recipe.adapters != "merged" or not has_adapters(network):
        return network
    return merge(copy_of_modules(network))


def trained_layer(network: nn.Module, name: str) -> nn.Module:
    """The trained module for a layer of `whole`."""
    layer = network.get_submodule(name)
    return running_copy(layer)[0] if is_copy_in_training(layer) else layer


def stored_name(network: nn.Module, name: str) -> str:
    """The name in `whole` of a trained layer; inverse of `trained_layer`."""
    for end in range(len(parts := name.split("."))):
        outer = ".".join(parts[: end + 1])
        module = network.get_submodule(outer)
        if is_copy_in_training(module) and name == f"{outer}.{running_copy(module)[1]}":
            return outer
    return name


def why_beside(network: nn.Module, name: str) -> str:
    """Why a layer that is, or belongs to, an adapter stays float; empty if it does not."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        outer = network.get_submodule(".".join(parts[:end]))
        if is_copy_in_training(outer):
            return "not used: a copy of it trains in its place" if parts[end] == "original_module" else ""
        if is_lora(outer) or is_adapted(outer):
            return "" if parts[end] == "base_layer" else STAYS_FLOAT
    return ""


def of_inner_network(
    quantize: Callable[..., Converted], network: nn.Module, example: Example, prefix: str, shares: Any
) -> Converted:
    """Quantize the network inside a ``PeftModel``, and use the names in the wrapper for the results.

    Args:
        quantize: Takes a network, an example, a prefix and shares.
        network: Any network.
        example: A call of it.
        prefix: Its name in the LightningModule.
        shares: Shares by name of the layer.
    """
    inner, path = inner_of(network)
    if not path:
        return quantize(network, example, prefix, shares)
    within = {name.removeprefix(f"{path}."): share for name, share in shares.items()}
    try:
        converted = quantize(inner, _by_keyword(network, example), join(prefix, path), within)
    except VerificationError as error:
        checks = [replace(check, name=join(path, check.name)) for check in error.checks]
        raise VerificationError(str(error), [join(path, name) for name in error.layers], checks) from error
    converted.coverage = [replace(row, name=join(path, row.name)) for row in converted.coverage]
    converted.checks = [replace(check, name=join(path, check.name)) for check in converted.checks]
    return converted


def _by_keyword(network: nn.Module, example: Example) -> Example:
    """An example with keyword inputs, named as in the outer network: the inner one may have another order."""
    parameters = inspect.signature(network.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    named = dict(zip(names, example.args, strict=False))
    return Example(example.args[len(named) :], named | dict(example.kwargs))
