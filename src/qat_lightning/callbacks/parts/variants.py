"""Running another variant of a network in place of the prepared one, for the duration of a test or prediction."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.graph.structures import look_into
from qat_lightning.measure.fidelity import Fidelity


class Guests:
    """Lets evaluations run another network, the guest, in place of any variant."""

    _guest: nn.Module | None = None

    @contextmanager
    def running(self, network: nn.Module) -> Iterator[None]:
        """Within the block, this network is what evaluations run."""
        self._guest = network
        try:
            yield
        finally:
            self._guest = None


class Stand(nn.Module):
    """Stands in for a prepared network and runs another on its inputs, wherever the LightningModule is.

    Args:
        network: What to run; not a child, so that moving the LightningModule does not move it.
        prepared: The network that it stands in for; its attributes stay reachable, and it is a child, so that
            parameters and metrics keep their places.
        on_cpu: Run on the CPU and bring the outputs back to the inputs' device.
        fidelity: If given, ``reference`` runs as well and the outputs are compared.
        reference: What to compare with; by default ``prepared``.
    """

    def __init__(
        self,
        network: nn.Module,
        prepared: nn.Module,
        *,
        on_cpu: bool,
        fidelity: Fidelity | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["_network"] = network
        self.__dict__["_prepared"] = prepared
        self.__dict__["_reference"] = prepared if reference is None else reference
        self.on_cpu = on_cpu
        self.fidelity = fidelity

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the other network."""
        outputs = self._call(self.__dict__["_network"], args, kwargs)
        if self.on_cpu and self.fidelity is not None:
            self.fidelity.compare(lambda: self.__dict__["_reference"](*args, **kwargs), outputs, (args, kwargs))
        return outputs

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self.on_cpu:
            return function(*args, **kwargs)
        look_into(args, kwargs)
        device = next(
            (leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), torch.device("cpu")
        )
        outputs = function(*tree_map(_to_cpu, args), **tree_map(_to_cpu, kwargs))
        look_into(outputs)
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, outputs)

    def __getattr__(self, name: str) -> Any:
        """The attributes of the network that it replaces; methods run on the guest, if that has them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            prepared, network = self.__dict__["_prepared"], self.__dict__["_network"]
            found = getattr(prepared, name)
            if not isinstance(found, types.MethodType) or found.__self__ is not prepared:
                return found
            instead = None if name.startswith("_") else getattr(network, name, None)
            return found if instead is None else lambda *args, **kwargs: self._call(instead, args, kwargs)


def _to_cpu(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.cpu()
    return leaf.float() if leaf.is_floating_point() else leaf
