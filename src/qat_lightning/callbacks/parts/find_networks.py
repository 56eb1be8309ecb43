"""Which modules of a LightningModule are the networks to quantize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.modules.loss import _Loss
from torchmetrics import Metric, MetricCollection

from qat_lightning.callbacks.parts.network import OWN_FORWARD
from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.graph.compiled import name_inside
from qat_lightning.layers.operators import module_types
from qat_lightning.modes.graph_network import GraphPart

_QUANTIZABLE = module_types("convolution", "transposed", "linear")


def find_networks(pl_module: LightningModule, module: str | Sequence[str] | None) -> list[str]:
    """Return dotted names of the networks to quantize; `OWN_FORWARD` for the LightningModule's own ``forward``.

    Of a network that was given to ``torch.compile``, the name is that of the module inside.

    Args:
        pl_module: The LightningModule.
        module: Names given by the user, or None to find the network.

    Raises:
        ConfigurationError: A named module does not exist.
        NetworkError: No name was given and there are several candidates; the message lists them.
    """
    if module is not None:
        names = [module] if isinstance(module, str) else list(module)
        for name in names:
            _check_named(pl_module, name)
        names = [name if name == OWN_FORWARD else name_inside(pl_module, name) for name in names]
        _refuse_overlap(names)
        return names
    candidates = _callable_parts(pl_module)
    has_forward = type(pl_module).forward is not LightningModule.forward
    own_layers = [name for name, child in candidates.items() if isinstance(child, _QUANTIZABLE)]
    # If candidates are members of a list, called one by one, the LightningModule's own forward is the network.
    own_layers += [name for name in candidates if len(candidates) > 1 and _in_list(pl_module, name)]
    if not candidates:
        raise NetworkError(
            f"{type(pl_module).__name__} holds no convolution or linear layer to quantize. Build its network "
            "in configure_model at the latest; if it is wrapped, name it with module='…'."
        )
    if own_layers and has_forward:
        return [OWN_FORWARD]
    if len(candidates) == 1:
        return [name_inside(pl_module, name) for name in candidates]
    candidates = dict(sorted(candidates.items(), key=lambda item: not _trains(item[1])))
    listed = ", ".join(f"{name!r} ({type(child).__name__})" for name, child in candidates.items())
    own = f", or module={OWN_FORWARD!r} for {type(pl_module).__name__}'s own forward" if has_forward else ""
    raise NetworkError(
        f"{type(pl_module).__name__} holds {len(candidates)} networks: {listed}. Say which to quantize: "
        f"module={next(iter(candidates))!r}, a list of names{own}."
    )


def _check_named(pl_module: LightningModule, name: str) -> None:
    if name == OWN_FORWARD:
        return
    try:
        found = pl_module.get_submodule(name) if name else None
    except AttributeError:
        found = None
    if found is not None and not _can_be_called(found):
        parts = list(_callable_parts(found, f"{name}."))
        own = f"or module={OWN_FORWARD!r} for {type(pl_module).__name__}'s own forward" if parts else "which has none"
        raise ConfigurationError(
            f"module={name!r} is a {type(found).__name__}, which is never called itself: name the networks in it, "
            f"module={parts!r}, {own}."
        )
    if found is None:
        have = ", ".join(child for child, _ in pl_module.named_children())
        raise ConfigurationError(
            f"module={name!r} does not exist in {type(pl_module).__name__}: use {OWN_FORWARD!r} for its own forward, "
            f"or a dotted name beginning with one of: {have or '(it has no submodules)'}."
        )


def _refuse_overlap(names: Sequence[str]) -> None:
    if not names:
        raise ConfigurationError("module=[] names no network: give at least one name, or None to find the network.")
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if OWN_FORWARD in (name, other) or f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                raise ConfigurationError(
                    f"module={list(names)!r} is not valid: {name!r} and {other!r} overlap. Give each part of the "
                    "LightningModule once."
                )


def _callable_parts(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return callable submodules with layers to quantize; lists and dicts of modules are replaced by their members."""
    parts: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, (Metric, MetricCollection, _Loss)) or not has_quantizable(child):
            continue
        parts |= {prefix + name: child} if _can_be_called(child) else _callable_parts(child, f"{prefix}{name}.")
    return parts


def _in_list(pl_module: LightningModule, name: str) -> bool:
    holder = name.rpartition(".")[0]
    return bool(holder) and isinstance(pl_module.get_submodule(holder), nn.ModuleList)


def _can_be_called(module: nn.Module) -> bool:
    """Whether a module has a ``forward``, which ``nn.ModuleList`` and ``nn.ModuleDict`` do not."""
    if isinstance(module, GraphPart):
        return False
    return getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in vars(module)


def has_quantizable(module: nn.Module) -> bool:
    """Whether a module is or contains a layer by which networks are found."""
    return any(isinstance(inner, _QUANTIZABLE) for inner in module.modules())


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def shared_layers(networks: Mapping[str, nn.Module]) -> tuple[dict[str, list[str]], list[str]]:
    """Parts with parameters that several networks share, and names under which each part would be quantized once.

    Args:
        networks: Networks by their names in the LightningModule.

    Returns:
        The outermost shared parts: the names of the networks, by one name of the part. And the names of these parts
        and of the other parts with layers to quantize.
    """
    users: dict[nn.Module, list[str]] = {}
    for name, network in networks.items():
        for module in network.modules():
            if next(module.parameters(), None) is not None:
                users.setdefault(module, []).append(name)
    shared = {module for module, names in users.items() if len(names) > 1}
    found: dict[str, list[str]] = {}
    parts: dict[nn.Module, str] = {}

    def visit(name: str, module: nn.Module) -> None:
        if module in shared:
            found.setdefault(parts.setdefault(module, name), users[module])
        elif shared.isdisjoint(module.modules()):
            parts[module] = name
        else:
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}", child)

    for name, network in networks.items():
        visit(name, network)
    return found, [name for module, name in parts.items() if has_quantizable(module)]
