"""Running another form of a network in the place of the prepared one, for the length of a test or a prediction."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.errors import ConfigurationError
from qat_lightning.measure import Agreement, SignalToQuantizationNoiseRatio, class_axis
from qat_lightning.structures import look_into

Variant = Literal["float", "fake_quant", "int8"]
VARIANTS: tuple[Variant, ...] = ("float", "fake_quant", "int8")


def check_variant(name: str | None) -> None:
    """Refuse a name that is no variant.

    Raises:
        ConfigurationError: With the names that are.
    """
    if name is not None and name not in VARIANTS:
        raise ConfigurationError(f"variant {name!r} is unknown: use one of {', '.join(VARIANTS)}, or None.")


class Fidelity:
    """How close the int8 outputs of a test are to fake-quant's: agreement of the top-1, and SQNR.

    Args:
        of_all_processes: Whether `compute` sums up over the processes of a distributed run, all of which then call it.

    Example:
        >>> fidelity = Fidelity()
        >>> fidelity.update(torch.eye(3), torch.eye(3))
        >>> fidelity.compute()
        {'agreement': 1.0, 'sqnr_db': inf}
    """

    def __init__(self, *, of_all_processes: bool = True) -> None:
        self.agreement = Agreement(sync_on_compute=of_all_processes)
        self.sqnr = SignalToQuantizationNoiseRatio(sync_on_compute=of_all_processes)

    def update(self, reference: Any, actual: Any) -> None:
        """Take one pair of outputs into account: tensors, or containers of them."""
        pairs = [
            (wanted.detach().float().cpu(), got.detach().float().cpu())
            for wanted, got in zip(tree_leaves(reference), tree_leaves(actual), strict=True)
            if isinstance(wanted, Tensor) and wanted.is_floating_point() and wanted.numel()
        ]
        for wanted, got in pairs:
            self.sqnr.update(wanted, got)
        # The first output with a class axis is taken for the prediction.
        for wanted, got in pairs:
            if class_axis(wanted) is not None:
                self.agreement.update(wanted, got)
                break

    def compute(self) -> dict[str, float]:
        """The values there are: no agreement without an output that has classes."""
        values = {}
        if self.agreement.update_called:
            values["agreement"] = float(self.agreement.compute())
        if self.sqnr.update_called:
            values["sqnr_db"] = float(self.sqnr.compute())
        return values


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
        if not self.on_cpu:
            return self.__dict__["_network"](*args, **kwargs)
        look_into(args, kwargs)
        device = next(
            (leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), torch.device("cpu")
        )
        outputs = self.__dict__["_network"](*tree_map(_to_cpu, args), **tree_map(_to_cpu, kwargs))
        look_into(outputs)
        outputs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, outputs)
        if self.fidelity is not None:
            self.fidelity.update(self.__dict__["_reference"](*args, **kwargs), outputs)
        return outputs

    def __getattr__(self, name: str) -> Any:
        """The attributes of the network that it stands in for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(self.__dict__["_prepared"], name)


def _to_cpu(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.cpu()
    return leaf.float() if leaf.is_floating_point() else leaf
