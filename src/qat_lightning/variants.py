"""Running another form of a network in the place of the prepared one, for the length of a test or a prediction."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.errors import ConfigurationError
from qat_lightning.measure import Agreement, SignalToQuantizationNoiseRatio, class_axis, outputs_by_path
from qat_lightning.processes import any_process, process_count
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

    It measures and never ends the test: outputs that cannot be compared, such as the rows that a detector finds in one
    network and not in the other, are left out, which `compute` says.

    Args:
        of_all_processes: Whether `compute` sums up over the processes of a distributed run, all of which then call it.

    Example:
        >>> fidelity = Fidelity()
        >>> fidelity.update(torch.eye(3), torch.eye(3))
        >>> fidelity.compute()
        {'agreement': 1.0, 'sqnr_db': inf}
    """

    def __init__(self, *, of_all_processes: bool = True) -> None:
        self.of_all_processes = of_all_processes
        self.agreement = Agreement(sync_on_compute=of_all_processes)
        self.sqnr = SignalToQuantizationNoiseRatio(sync_on_compute=of_all_processes)
        self._left_out: dict[str, int] = {}

    def update(self, reference: Any, actual: Any) -> None:
        """Take one pair of outputs into account: tensors, or containers of them."""
        wanted, got = outputs_by_path(reference), outputs_by_path(actual)
        predicted = False
        for path in dict.fromkeys([*wanted, *got]):
            if path not in wanted or path not in got or wanted[path].shape != got[path].shape:
                self._leave_out("an output has another shape than fake-quant's, or only one of them has it")
            elif wanted[path].numel() and (wanted[path].is_floating_point() or wanted[path].is_complex()):
                one, other = _on_cpu(wanted[path]), _on_cpu(got[path])
                self.sqnr.update(one, other)
                # The first output with a class axis is taken for the prediction.
                if not predicted and class_axis(wanted[path]) is not None:
                    self.agreement.update(one, other)
                    predicted = True

    def compare(self, reference: Callable[[], Any], actual: Any) -> None:
        """Likewise, where the reference is still to be computed; what goes wrong is left out, and said at the end."""
        try:
            self.update(reference(), actual)
        except Exception as error:  # noqa: BLE001 (whatever it is, the user's test goes on)
            self._leave_out(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def compute(self) -> dict[str, float]:
        """The values there are: no agreement without an output that has classes."""
        for reason, times in self._left_out.items():
            warnings.warn(f"Not in the agreement and SQNR of int8, {times} times: {reason}.", stacklevel=2)
        values = {}
        for name, metric in (("agreement", self.agreement), ("sqnr_db", self.sqnr)):
            seen = metric.update_called
            if self.of_all_processes and process_count() > 1:
                seen = any_process(seen)
            if seen:
                with warnings.catch_warnings():
                    # Of a process that had nothing to compare, while others had.
                    warnings.filterwarnings("ignore", message=".*before the ``update`` method.*")
                    values[name] = float(metric.compute())
        return values

    def _leave_out(self, reason: str) -> None:
        self._left_out[reason] = self._left_out.get(reason, 0) + 1


def _on_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).float().cpu()


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
            self.fidelity.compare(lambda: self.__dict__["_reference"](*args, **kwargs), outputs)
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
