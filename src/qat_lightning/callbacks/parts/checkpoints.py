"""Loading float and prepared checkpoints into prepared networks, and float weights out of prepared checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.callbacks.parts.checkpoint_io import read_checkpoint, read_float_state, read_sharded
from qat_lightning.errors import CheckpointMismatchError, ConfigurationError
from qat_lightning.graph.module_order import list_parameters_as_usual, order_by_keys
from qat_lightning.graph.scopes import dotted
from qat_lightning.modes.prepared import PreparedState, check_recipe, float_keys, prepared_state
from qat_lightning.modes.sharded import is_sharded
from qat_lightning.numerics.state_entries import from_entry, without_placeholders
from qat_lightning.recipes.folding import unfold_state
from qat_lightning.storage import Place, is_folder, place

STATE_KEY = "_quantization._extra_state"
"""Suffix of the key of a prepared network's own entry in a ``state_dict``."""


def float_state_dict(checkpoint: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Extract the float weights of a checkpoint, for a LightningModule without quantization.

    Args:
        checkpoint: A Lightning checkpoint, its ``state_dict``, or a path, with or without quantization. The path may be
            a folder that ``ModelParallelStrategy`` saved, or a URL that fsspec supports (``s3://bucket/last.ckpt``).

    Returns:
        A ``state_dict`` that the float LightningModule loads strictly.

    Example:
        >>> import torch
        >>> float_state_dict({"state_dict": {"net.weight": torch.ones(1)}})
        {'net.weight': tensor([1.])}
    """
    if isinstance(checkpoint, (str, Path)):
        where = place(checkpoint)
        return float_state_dict(read_sharded(where) if is_folder(where) else read_checkpoint(where))
    state: dict[str, Any] = dict(checkpoint.get("state_dict", checkpoint))
    for key in [key for key in state if key.endswith(STATE_KEY)]:
        prefix, extra = key.removesuffix(STATE_KEY), from_entry(state[key])
        for added in extra["added_keys"]:
            state.pop(prefix + added, None)  # its layer may have been replaced since
        unfold_state(state, extra.get("folded", {}), prefix)
    return state


def prepared_entry(state: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
    """Return the entry that describes a prepared network in a ``state_dict``; None if that network is float.

    Args:
        state: ``state_dict`` of a LightningModule.
        prefix: The network's dotted name in it.
    """
    extra = state.get(f"{prefix}.{STATE_KEY}" if prefix else STATE_KEY)
    return None if extra is None else from_entry(extra)


def holds_quantization(state: Mapping[str, Any]) -> bool:
    """Whether the ``state_dict`` of a LightningModule contains a prepared network."""
    return any(key.endswith(STATE_KEY) for key in state)


def read_float_weights(path: Place, name: str, prefix: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read the weights of one network from the file ``float_checkpoint=``.

    Args:
        path: A Lightning checkpoint, or a ``state_dict``.
        name: The network's name in the LightningModule, for messages.
        prefix: Prefix of its keys, without the last dot.
        wanted: The float network's own ``state_dict``.

    Raises:
        CheckpointFileError: The file cannot be read.
        ConfigurationError: The file belongs to another model.
    """
    found = read_float_state(path)
    prefix = dotted(prefix)

    def fits(key: str) -> bool:
        if prefix + key not in found:
            return False
        value, own = found[prefix + key], wanted[key]
        return not isinstance(own, Tensor) or (isinstance(value, Tensor) and value.shape == own.shape)

    wrong = [key for key in wanted if not fits(key)]
    if wrong:
        raise ConfigurationError(
            f"float_checkpoint={str(path)!r} lacks {len(wrong)} of the {len(wanted)} weights of {name!r}, or has them "
            f"in another shape, for example {prefix + min(wrong)!r}: it is a checkpoint of another model."
        )
    return {key: found[prefix + key] for key in wanted}


def note_added_keys(prepared: nn.Module) -> None:
    """Record in a prepared network's ``state_dict`` entry which keys preparation has added."""
    prepared_state(prepared).added_keys = sorted(set(prepared.state_dict()) - float_keys(prepared))


def _load_state_dict(self: LightningModule, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any) -> Any:
    """As `nn.Module.load_state_dict`, with instructions in the error if only quantization entries are unexpected.

    Raises:
        CheckpointMismatchError: The checkpoint of a quantized network is loaded strictly into a float network.
    """
    if strict and holds_quantization(state_dict) and not any(isinstance(m, PreparedState) for m in self.modules()):
        name = type(self).__name__
        raise CheckpointMismatchError(
            f"This checkpoint is from a run with quantization, and {name} is float. To load its float weights, write "
            f"`class {name}(LoadsQuantizedCheckpoints, LightningModule)`, or load "
            "qat_lightning.float_state_dict(path) with load_state_dict. To continue with quantization, give the "
            "Trainer the callback of that run."
        )
    return nn.Module.load_state_dict(self, state_dict, strict=strict, **kwargs)


if "load_state_dict" not in LightningModule.__dict__:
    # For a class without our mixin, `load_from_checkpoint` calls only this method.
    LightningModule.load_state_dict = _load_state_dict  # type: ignore[method-assign, assignment]


class LoadsQuantizedCheckpoints:
    """Mixin that lets ``load_from_checkpoint`` load the float weights of a quantization-aware run.

    List it before LightningModule among the base classes.

    Example:
        >>> class Model(LoadsQuantizedCheckpoints, LightningModule):
        ...     pass
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the float entries, unless the networks are already prepared."""
        prepared = any(isinstance(module, PreparedState) for module in self.modules())  # type: ignore[attr-defined]
        if not prepared:
            checkpoint["state_dict"] = float_state_dict(checkpoint)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


def guard_loading(
    pl_module: LightningModule,
    prepared: Mapping[str, nn.Module],
    prefixes: Mapping[str, Sequence[str]],
    loaded: Callable[[], None],
) -> RemovableHandle:
    """Check every ``state_dict`` before it is loaded into a LightningModule with prepared networks.

    A checkpoint with another recipe raises before anything is overwritten. A float checkpoint is completed with the
    present ranges, so that it loads strictly and starts a quantization-aware run.

    Args:
        pl_module: The LightningModule.
        prepared: Its prepared networks by name.
        prefixes: The prefixes of each network in the ``state_dict``, one for each of its names, without the last dot.
        loaded: Called just before a ``state_dict`` is loaded.

    Returns:
        A handle that removes this check.
    """

    def guard(module: nn.Module, state_dict: dict[str, Any], outer: str, *args: Any) -> None:
        if without_placeholders(state_dict):
            return  # a partial state_dict; missing entries keep their values
        # Another module, such as an average of weights, may hold a copy of the LightningModule with its hooks.
        saved = {key for key in state_dict if key.startswith(outer) and key.endswith(STATE_KEY)}
        inner = {name: [outer + dotted(prefix) for prefix in names] for name, names in prefixes.items()}
        _refuse_other(state_dict, prepared, inner, saved)
        for name, network in prepared.items():
            for prefix in inner[name]:
                if prefix + STATE_KEY in state_dict:
                    here = network if module is pl_module else module.get_submodule(prefixes[name][0])
                    _take_order(here, state_dict, prefix)
                elif not saved:
                    _complete(state_dict, network, prefix)
        loaded()

    handle: RemovableHandle = pl_module.register_load_state_dict_pre_hook(guard)  # type: ignore[no-untyped-call]
    return handle


def exchange_weights(pl_module: LightningModule, prepared: Mapping[str, nn.Module]) -> list[RemovableHandle]:
    """Let prepared networks and float networks of their classes load each other's ``state_dict``, in both directions.

    A target network that is not quantized is often synchronized in training:
    ``self.target.load_state_dict(self.net.state_dict())``. It takes the float entries; the prepared network keeps its
    ranges.

    Args:
        pl_module: The LightningModule.
        prepared: Its prepared networks by name.

    Returns:
        Handles that end this.
    """
    classes = {type(prepared_state(network).float_network) for network in prepared.values()}
    own = {module for network in prepared.values() for module in network.modules()}
    others = [module for module in pl_module.modules() if type(module) in classes and module not in own]
    hooks: list[tuple[nn.Module, Callable[..., None]]] = [(module, _leave_out_quantization) for module in others]
    hooks += [(network, _keep_quantization) for network in prepared.values() if not is_sharded(network)]
    return [module.register_load_state_dict_pre_hook(hook) for module, hook in hooks]


def _leave_out_quantization(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if any(key.startswith(prefix) for key in state_dict if key.endswith(STATE_KEY)):
        entries = float_state_dict(state_dict)
        state_dict.clear()
        state_dict.update(entries)


def _keep_quantization(network: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if prefix + STATE_KEY not in state_dict:
        _complete(state_dict, network, prefix)


def refuse_other_checkpoint(
    state: Mapping[str, Any], prepared: Mapping[str, nn.Module], prefixes: Mapping[str, Sequence[str]]
) -> None:
    """Raise if the networks in a LightningModule's ``state_dict`` were prepared with other settings.

    Args:
        state: ``state_dict`` of a run with quantization.
        prepared: The prepared networks by name.
        prefixes: The prefixes of each network in a ``state_dict``, one for each of its names, without the last dot.

    Raises:
        CheckpointMismatchError: The settings differ; the message lists both.
    """
    saved = {key for key in state if key.endswith(STATE_KEY)}
    inner = {name: [dotted(prefix) for prefix in names] for name, names in prefixes.items()}
    _refuse_other(state, prepared, inner, saved)


def _refuse_other(
    state: Mapping[str, Any], prepared: Mapping[str, nn.Module], inner: Mapping[str, Sequence[str]], saved: set[str]
) -> None:
    keys = {name: [prefix + STATE_KEY for prefix in prefixes] for name, prefixes in inner.items()}
    for name, network in prepared.items():
        for key in keys[name]:
            if key in state:
                check_recipe(prepared_state(network).recipe, state[key])
    expected = {key for of_one in keys.values() for key in of_one}
    if saved and saved != expected:
        raise CheckpointMismatchError(
            "The checkpoint was written by a run that quantized other modules: "
            f"{_names(saved)} there, {_names(expected)} here. Give module= the same names."
        )


def _take_order(network: nn.Module, saved: Mapping[str, Any], prefix: str) -> None:
    """Reorder a network's parameters as in the checkpoint, if that order is not the float network's.

    The restored optimizer pairs states with parameters by order. Early checkpoints of mode ``fx`` have another order,
    and in early ones of every mode learned scales follow their layers.
    """
    state, entry = prepared_state(network), saved[prefix + STATE_KEY]
    values = from_entry(entry)
    if not values.get("float_first", False):
        state.float_first = False
        list_parameters_as_usual(network)
    if isinstance(entry, Mapping) or values.get("own_order", False) or state.own_order:
        order_by_keys(network, saved, prefix)
        usual = [name for name, _ in state.float_network.named_parameters()]
        now = [name for name, _ in network.named_parameters()]
        state.own_order = usual != [name for name in now if name in set(usual)]


def _complete(state_dict: dict[str, Any], network: nn.Module, prefix: str) -> None:
    reworking = prepared_state(network).reworking
    given = float_keys(network) if reworking is None else set(reworking.given.state_dict())
    if not all(prefix + key in state_dict for key in given):
        return  # Not a float checkpoint of this network: strict loading reports what is missing.
    if reworking is not None:
        reworked = reworking.rework({key: state_dict.pop(prefix + key) for key in given})
        state_dict.update({prefix + key: value for key, value in reworked.items()})
    for key, value in network.state_dict().items():
        state_dict.setdefault(prefix + key, value)


def _names(keys: set[str]) -> str:
    return ", ".join(repr(key.removesuffix(STATE_KEY).strip(".") or ".") for key in sorted(keys))
