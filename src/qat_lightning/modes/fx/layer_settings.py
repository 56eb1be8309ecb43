"""What a forward sets in the layers that it calls, such as ``self.backbone.eval()``, which is not part of a graph."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx.proxy import Proxy, TraceError

from qat_lightning.modes.plain_attributes import plain_attributes


class LayerSettings:
    """The settings with which a trace calls layers as a whole: their training flags and plain attributes.

    Args:
        network: The network, before its ``forward`` runs.

    Attributes:
        evaluated: Paths of the layers that ``forward`` puts in evaluation.
    """

    def __init__(self, network: nn.Module) -> None:
        self._before = {module: (module.training, plain_attributes(module)) for module in network.modules()}
        self._flags: dict[str, bool] = {}
        self.evaluated: set[str] = set()

    def note(self, path: str, layer: nn.Module) -> None:
        """Record a call of a layer.

        Raises:
            torch.fx.proxy.TraceError: ``forward`` has changed what a graph cannot change.
        """
        for name, module in layer.named_modules(prefix=path):
            if module not in self._before:
                continue
            trained, attributes = self._before[module]
            now = plain_attributes(module)
            changed = [own for own, value in attributes.items() if own not in now or now[own] != value]
            if changed:
                raise TraceError(
                    f"forward sets the attribute {changed[0]!r} of {name!r}, which a graph does not repeat: set it in "
                    "__init__"
                )
            if module.training and not trained:
                raise TraceError(f"forward sets {name!r} to training in evaluation, which a graph does not repeat")
            if self._flags.setdefault(name, module.training) != module.training:
                raise TraceError(f"forward calls {name!r} both in training and in evaluation")
            if trained and not module.training:
                self.evaluated.add(name)


class TracedValue(Proxy):
    """A value of a graph, which refuses an assignment of other data, as ``self.weight.data = ...`` makes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise TraceError("a graph does not assign data to a tensor")
        super().__setattr__(name, value)
