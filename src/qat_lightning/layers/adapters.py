"""Adapters of peft: low-rank updates (LoRA) that are merged into the weight beside which they train.

peft is never imported here: if nobody has imported it, there are no adapters.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_MERGED_BY_OTHERS = "merge_and_unload() before the fit trains all weights"


def _of_peft(module: str, name: str) -> Any:
    """A class of peft; an empty tuple if that part of peft was never imported."""
    return getattr(sys.modules.get(f"peft.{module}"), name, ())


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer with a peft adapter, or a layer that peft replaces by a trainable copy.

    Example:
        >>> is_adapted(nn.Linear(2, 2))
        False
    """
    types = (_of_peft("tuners.tuners_utils", "BaseTunerLayer"), _of_peft("utils.other", "AuxiliaryTrainingWrapper"))
    return isinstance(module, types)


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a layer with low-rank adapters."""
    return isinstance(module, _of_peft("tuners.lora.layer", "LoraLayer"))


def is_copy_in_training(module: nn.Module) -> bool:
    """Whether a module wraps a layer and runs a trainable copy of it (``modules_to_save``)."""
    return isinstance(module, _of_peft("utils.other", "ModulesToSaveWrapper"))


def has_adapters(network: nn.Module) -> bool:
    """Whether there is an adapter anywhere in a network."""
    return any(map(is_adapted, network.modules()))


def inner_of(network: nn.Module) -> tuple[nn.Module, str]:
    """The network inside a ``PeftModel`` without adapters, and its name there; any other network is returned itself."""
    if not isinstance(network, _of_peft("peft_model", "PeftModel")) or has_adapters(network):
        return network, ""
    if cast("Any", network).active_peft_config.is_prompt_learning:  # prompt learning prepends embeddings of its own
        return network, ""
    inner: nn.Module = cast("Any", network).get_base_model()
    return inner, next(name for name, module in network.named_modules() if module is inner)


def base_of(layer: nn.Module) -> nn.Module:
    """The layer that the adapters belong to."""
    base: nn.Module = cast("Any", layer).get_base_layer()
    return base


def running_copy(wrapper: nn.Module) -> tuple[nn.Module, str]:
    """The copy that runs instead of a layer, and its name in the wrapper."""
    active = cast("Any", wrapper).active_adapters[0]
    return cast("Any", wrapper).modules_to_save[active], f"modules_to_save.{active}"


def why_unmerged(module: nn.Module) -> str:
    """Why an adapter cannot be merged while it trains, and what to do; empty if it can."""
    layer = cast("Any", module)
    name = type(module).__name__
    if is_copy_in_training(module):
        return "" if layer.active_adapters else "its adapter is not active: call set_adapter(...)"
    if not is_lora(module):
        return f"{name} of peft is not a LoRA layer: {_MERGED_BY_OTHERS}"
    if layer.merged:
        return "its adapters are merged already: call unmerge_adapter()"
    if layer.disable_adapters:
        return "its adapters are disabled: call enable_adapter_layers()"
    return _why_not_this_lora(layer, name)


def why_not_beside(module: nn.Module) -> str:
    """Why an adapter cannot stay float beside a rounded weight, and what to do; empty if it can."""
    variants = getattr(module, "lora_variant", None) if is_lora(module) else None
    if not variants:
        return ""
    names = ", ".join(sorted({type(variant).__name__ for variant in variants.values()}))
    return (
        f"{names} computes with the weight directly, which is quantized only where its layer runs: use plain LoRA, or "
        "adapters='merged'"
    )


def _why_not_this_lora(layer: Any, name: str) -> str:
    if not isinstance(layer, (_of_peft("tuners.lora.layer", "Linear"), _of_peft("tuners.lora.layer", "Embedding"))):
        return f"LoRA of {type(base_of(layer)).__name__} cannot be merged in training; only that of linear layers can"
    adapters = _active(layer)
    variants = {type(layer.lora_variant[adapter]).__name__ for adapter in adapters if adapter in layer.lora_variant}
    if variants - {"DoraLinearVariant"}:
        return f"{', '.join(sorted(variants))} is not plain LoRA"
    if variants and len(adapters) > 1:
        return "several adapters are active, and one of them uses DoRA: call set_adapter(...) with one of them"
    if variants and any(_drops(layer, adapter) for adapter in adapters):
        return "DoRA with lora_dropout: use lora_dropout=0"
    if any(layer.lora_bias.get(adapter) for adapter in adapters) and base_of(layer).bias is None:
        return "lora_bias=True on a layer without bias: use lora_bias=False"
    return ""


def _active(layer: Any) -> list[str]:
    known = {*layer.lora_A, *layer.lora_embedding_A}
    return [adapter for adapter in layer.active_adapters if adapter in known]


def _drops(layer: Any, adapter: str) -> bool:
    return isinstance(layer.lora_dropout[adapter], nn.Dropout) and layer.lora_dropout[adapter].p > 0


def merged_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Weight and bias of a layer with its active adapters merged in; gradients pass through.

    Computed in the precision of the weight, also under autocast, so that training uses the weight that will be stored.
    """
    layer, base = cast("Any", module), cast("Any", base_of(module))
    weight, bias = base.weight, getattr(base, "bias", None)
    with torch.autocast(weight.device.type, enabled=False):
        for adapter in _active(layer):
            weight = _with_adapter(layer, adapter, weight)
            if layer.lora_bias.get(adapter):
                bias = bias + layer.lora_B[adapter].bias * layer.scaling[adapter]
    return {"weight": weight} | ({} if bias is None else {"bias": bias})


def _with_adapter(layer: Any, adapter: str, weight: Tensor) -> Tensor:
    if adapter in layer.lora_embedding_A:
        update = (layer.lora_embedding_B[adapter] @ layer.lora_embedding_A[adapter]).T
    else:
        update = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
        update = update.T if layer.fan_in_fan_out else update
    merged: Tensor = weight + (update * layer.scaling[adapter]).to(weight.dtype)
    if adapter not in layer.lora_variant:
        return merged
    rows = merged.T if layer.fan_in_fan_out else merged
    # The norm is constant in the backward pass, as in the DoRA paper and in peft.
    factor = layer.lora_magnitude_vector[adapter].weight / torch.linalg.norm(rows.detach(), dim=1)
    rows = factor.to(weight.dtype)[:, None] * rows
    result: Tensor = rows.T if layer.fan_in_fan_out else rows
    return result


def dropped(module: nn.Module, x: Tensor) -> Tensor | None:
    """The effect of dropout in front of the adapters on the output of their layer, in training; None without dropout.

    A merged weight has no separate input for an adapter, so this zero-mean term is added to the output.
    """
    layer = cast("Any", module)
    found: Tensor | None = None
    for adapter in _active(layer):
        if module.training and _drops(layer, adapter) and adapter in layer.lora_A:
            given = x.to(layer.lora_A[adapter].weight.dtype)
            noise = layer.lora_dropout[adapter](given) - given
            more = nn.functional.linear(layer.lora_A[adapter](noise), layer.lora_B[adapter].weight)
            found = more * layer.scaling[adapter] if found is None else found + more * layer.scaling[adapter]
    return found


@torch.no_grad()
def merge(network: nn.Module) -> nn.Module:
    """Replace all layers with adapters by plain layers with merged weights.

    Args:
        network: Changed in place. It must own its modules; parameters may be shared with another network.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if not is_adapted(module):
            continue
        if module not in made:
            made[module] = running_copy(module)[0] if is_copy_in_training(module) else _merged(module)
        parent, _, leaf = name.rpartition(".")
        network.get_submodule(parent)._modules[leaf] = made[module]
    network.__dict__.pop("peft_config", None)
    return network


def _merged(layer: nn.Module) -> nn.Module:
    base = base_of(layer)
    for name, value in merged_parameters(layer).items():
        if value is not base._parameters[name]:
            base._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
    for name in _HOOKS:
        outer, inner = layer.__dict__[name], base.__dict__[name]
        for key, hook in outer.items():
            inner[key] = hook
    return base


def take_over_choice(network: nn.Module, trained: nn.Module) -> None:
    """Activate the same adapters in ``network`` as in ``trained``, whose modules have the same names."""
    for name, module in trained.named_modules():
        if is_adapted(module):
            cast("Any", network.get_submodule(name))._active_adapter = cast("Any", module)._active_adapter
