"""Layers of a prepared network that other code has replaced since, for example by a new head for another task."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from qat_lightning.errors import NetworkError
from qat_lightning.graph.scopes import join
from qat_lightning.layers.operators import WEIGHTED
from qat_lightning.modes.prepared import PreparedState, copy_of_modules, prepared_state
from qat_lightning.numerics.fake_quantize import FakeQuantize


def remember_layers(prepared: nn.Module) -> None:
    """Record the classes of all modules of a network that was just prepared."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    # What belongs to the quantization may be created later.
    own = {name for name, module in modules.items() if isinstance(module, (FakeQuantize, PreparedState))}
    kept = {name: _name_of(type(m)) for name, m in modules.items() if name not in own and not _inside(name, own)}
    prepared_state(prepared).__dict__["layers"] = kept


def replaced_layers(prepared: nn.Module) -> dict[str, str]:
    """The modules that are not those of the preparation, by name, with what happened to them; the outermost only."""
    before: dict[str, str] = prepared_state(prepared).__dict__.get("layers", {})
    now = dict(prepared.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}
    for name, kind in before.items():
        module = now.get(name)
        if module is None:
            found[name] = "was removed after the network was prepared"
        elif not _is_a(module, kind):
            found[name] = f"was replaced by a {type(module).__name__} after the network was prepared"
    known = {now[name] for name in before if name in now}
    for name, module in now.items() if before else ():
        if name not in before and name.rpartition(".")[0] in before and _has_layers(module, known):
            found[name] = "was added after the network was prepared"
    return {name: what for name, what in found.items() if not _inside(name, found.keys() - {name})}


def refuse_replaced(prepared: nn.Module, name: str) -> None:
    """Refuse to continue with a prepared network in which layers were replaced.

    Args:
        prepared: Prepared in an earlier stage.
        name: Its name in the LightningModule.

    Raises:
        NetworkError: There are such layers; the message names them and the remedy.
    """
    prefix = prepared_state(prepared).prefix
    found = "; ".join(f"{join(prefix, inner)!r} {what}" for inner, what in replaced_layers(prepared).items())
    if found:
        raise NetworkError(
            f"{name!r} has fake-quantization of an earlier fit, but {found}, and has none. What to do: load the float "
            "weights into a new LightningModule that has these layers, "
            "new.load_state_dict(qat_lightning.float_state_dict(old.state_dict())), and fit that with a new callback."
        )


def take_replaced(prepared: nn.Module) -> dict[str, str]:
    """Let replaced layers be part of the float network inside a prepared one, and stay float.

    Returns:
        Their names, and why they stay float.
    """
    state = prepared_state(prepared)
    found = {name: f"it {what}" for name, what in replaced_layers(prepared).items()}
    for name, why in list(found.items()):
        holder, _, leaf = name.rpartition(".")
        present = dict(prepared.named_modules(remove_duplicate=False)).get(name)
        modules = state.float_network.get_submodule(holder)._modules
        if present is None:
            modules.pop(leaf, None)
        else:
            modules[leaf] = copy_of_modules(present)
            found |= {join(name, inner): why for inner, m in present.named_modules() if isinstance(m, WEIGHTED)}
    state.left_float.update(found)
    return found


def _has_layers(module: nn.Module, known: Collection[nn.Module]) -> bool:
    """Whether a module contains layers to quantize other than the known ones."""
    return any(isinstance(inner, WEIGHTED) and inner not in known for inner in module.modules())


def _is_a(module: nn.Module, kind: str) -> bool:
    """Whether a module is of this class, or of one that ``fully_shard`` or a parametrization derived from it."""
    plain = type(module).__name__ in ("Module", "FSDPModule")
    return kind in {_name_of(cls) for cls in type(module).__mro__ if plain or cls is not nn.Module}


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _inside(name: str, others: Collection[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)
