"""Weights in and out of prepared networks: float into prepared, prepared into float, and no other into either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.errors import CheckpointMismatchError
from qat_lightning.flows.base import float_keys, prepared_state
from qat_lightning.recipe import check_recipe

_STATE_KEY = "_quantization._extra_state"


def float_weights(prepared: nn.Module) -> dict[str, Tensor]:
    """A detached copy, on the CPU, of the part of a prepared network's ``state_dict`` that the float network has."""
    keys = float_keys(prepared)
    return {key: value.detach().cpu().clone() for key, value in prepared.state_dict().items() if key in keys}


def guard_loading(
    pl_module: LightningModule,
    prepared: Mapping[str, nn.Module],
    prefixes: Mapping[str, str],
    loaded: Callable[[], None],
) -> RemovableHandle:
    """Look at every ``state_dict`` before it is loaded into a LightningModule whose networks are prepared.

    A checkpoint of another recipe is refused before anything is overwritten. A float checkpoint is completed with the
    present ranges, so that it loads strictly and starts a quantization-aware run.

    Args:
        pl_module: The LightningModule.
        prepared: Its prepared networks by name.
        prefixes: The prefix of each in the ``state_dict``, without the last dot.
        loaded: Called when a ``state_dict`` is about to be loaded.

    Returns:
        A handle that removes the guard.
    """

    def guard(module: nn.Module, state_dict: dict[str, Any], outer: str, *args: Any) -> None:
        # Another module may hold a copy of the LightningModule, hooks and all, under a prefix: averages of weights do.
        saved = {key for key in state_dict if key.startswith(outer) and key.endswith(_STATE_KEY)}
        inner = {name: outer + (f"{prefix}." if prefix else "") for name, prefix in prefixes.items()}
        for name, network in prepared.items():
            prefix = inner[name]
            key = prefix + _STATE_KEY
            if key in state_dict:
                check_recipe(prepared_state(network).recipe, state_dict[key])
            elif not saved:
                _complete(state_dict, network, prefix)
        expected = {prefix + _STATE_KEY for prefix in inner.values()}
        if saved and saved != expected:
            raise CheckpointMismatchError(
                "The checkpoint was written by a run that quantized other modules: "
                f"{_names(saved)} there, {_names(expected)} here. Give module= the same names."
            )
        loaded()

    handle: RemovableHandle = pl_module.register_load_state_dict_pre_hook(guard)  # type: ignore[no-untyped-call]
    return handle


def _complete(state_dict: dict[str, Any], network: nn.Module, prefix: str) -> None:
    if not all(prefix + key in state_dict for key in float_keys(network)):
        return  # Not this network's float checkpoint: strict loading says what is missing.
    for key, value in network.state_dict().items():
        state_dict.setdefault(prefix + key, value)


def _names(keys: set[str]) -> str:
    return ", ".join(repr(key.removesuffix(_STATE_KEY).strip(".") or ".") for key in sorted(keys))
