"""Modules fused by upstream that stay float: shown under the names of the float network only."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule

from qat_lightning.layers.qat_modules import FoldedLayer
from qat_lightning.modes.fx.train_and_eval import set_module


class FloatFused(nn.Module):
    """Replaces upstream's fused module, whose children would show their tensors under second names.

    Args:
        fused: A layer and the modules after it; the layer's tensors belong to this module, and a BatchNorm stays
            registered where the float network has it.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.__dict__["fused"] = fused
        layer: nn.Module = fused[0]
        # The same dictionaries: a tensor that is replaced in one is replaced in the other.
        for table in ("_parameters", "_buffers"):
            self.__dict__[table] = layer.__dict__[table]
        self._non_persistent_buffers_set = layer._non_persistent_buffers_set

    def forward(self, *args: Any) -> Any:
        """Run the layer and the modules after it."""
        return self.__dict__["fused"](*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Earlier releases saved the second names as well.
        for key in [key for key in state_dict if key.startswith(prefix) and key[len(prefix)].isdigit()]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


FUSED = (FoldedLayer, _FusedModule, FloatFused)
"""Modules that compute several layers of the float network at once."""


def hide_second_names(network: nn.Module) -> None:
    """Replace upstream's fused modules without FakeQuantize by `FloatFused`."""
    for path, module in list(network.named_modules()):
        if isinstance(module, _FusedModule) and not hasattr(module, "weight_fake_quant") and len(module):
            set_module(network, path, FloatFused(module))


def show_fused(network: nn.Module) -> None:
    """Undo `hide_second_names`, for upstream's converter."""
    for path, module in list(network.named_modules()):
        if isinstance(module, FloatFused):
            set_module(network, path, module.__dict__["fused"])
