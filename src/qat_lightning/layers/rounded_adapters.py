"""Layers with low-rank adapters that train with the rounding of the integer layer into which both are merged.

The weight with its active adapters merged in is rounded, since that is what is stored. The weight itself stays frozen,
and gradients reach the adapters through the rounding.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.func import functional_call

from qat_lightning.errors import NetworkError
from qat_lightning.layers.adapters import base_of, dropped, is_lora, merged_parameters
from qat_lightning.layers.rounded import ACTIVATION, RoundedLayer, round_as, round_layer
from qat_lightning.settings.recipe import Recipe

_PREFIX = "RoundedLora"


class _RoundedLora(RoundedLayer):
    def parts(self) -> Mapping[str, Tensor]:
        """The merged weight."""
        return {"weight": merged_parameters(self)["weight"]}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Same as the float layer. With adapters disabled nothing is rounded, for comparison."""
        layer = cast("Any", self)
        if not self.rounds() or layer.disable_adapters:
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise NetworkError(
                "adapter_names= chooses an adapter for each sample, but one merged weight is quantized for all: call "
                "set_adapter(...), or use adapters='float'."
            )
        parameters = merged_parameters(self)
        parameters["weight"] = self.rounded("weight", parameters["weight"])
        given = self._modules[ACTIVATION](x) if ACTIVATION in self._modules else x  # type: ignore[misc]
        result = functional_call(base_of(self), parameters, (given,))
        noise = dropped(self, x)
        return result if noise is None else result + noise.to(result.dtype)


def round_trained(layer: nn.Module, recipe: Recipe) -> None:
    """`round_layer` for layers with or without adapters; adapters are merged."""
    if is_lora(layer):
        round_as(layer, _class_of(type(layer)), recipe)
    else:
        round_layer(layer, recipe)


def _class_of(lora_type: type[nn.Module]) -> type[nn.Module]:
    name = f"{_PREFIX}{lora_type.__name__}"
    if name not in globals():
        contents = {"__module__": __name__, "__doc__": f"`peft.tuners.lora.layer.{lora_type.__name__}`, rounded."}
        globals()[name] = types.new_class(
            name, (_RoundedLora, lora_type), exec_body=lambda space: space.update(contents)
        )
    made: type[nn.Module] = globals()[name]
    return made


def __getattr__(name: str) -> Any:
    """Create the class of a layer that is unpickled before any was rounded."""
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from peft.tuners.lora import layer

    return _class_of(getattr(layer, name.removeprefix(_PREFIX)))
