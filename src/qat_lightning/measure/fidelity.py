"""How close the int8 outputs in a test are to those of fake-quant."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat_lightning.measure.metrics import Agreement, SignalToQuantizationNoiseRatio, class_axis, outputs_by_path
from qat_lightning.processes import any_process, process_count


class Fidelity:
    """How close the int8 outputs in a test are to those of fake-quant: agreement of the top-1 class, and SQNR.

    It never fails the test: outputs that cannot be compared, such as detections that exist in only one of the networks,
    are left out, and `compute` reports them.

    Args:
        of_all_processes: Whether `compute` sums over the processes of a distributed run; all of them have to call it
            then.

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

    def update(self, reference: Any, actual: Any, inputs: Any = ()) -> None:
        """Add a pair of outputs: tensors, or containers of them; ``inputs`` shows which outputs are per token."""
        wanted, got = outputs_by_path(reference), outputs_by_path(actual)
        predicted = False
        for path in dict.fromkeys([*wanted, *got]):
            if path not in wanted or path not in got or wanted[path].shape != got[path].shape:
                self._leave_out("an output has a different shape from fake-quant's, or exists in only one of the two")
            elif wanted[path].numel() and (wanted[path].is_floating_point() or wanted[path].is_complex()):
                one, other = _on_cpu(wanted[path]), _on_cpu(got[path])
                self.sqnr.update(one, other)
                # The first output with a class axis counts as the prediction.
                axis = None if predicted else class_axis(wanted[path], inputs)
                if axis is not None:
                    self.agreement.update(one.movedim(axis, 1), other.movedim(axis, 1))
                    predicted = True

    def compare(self, reference: Callable[[], Any], actual: Any, inputs: Any = ()) -> None:
        """Compute the reference and add the pair; if that fails, the pair is left out and reported at the end."""
        try:
            self.update(reference(), actual, inputs)
        except Exception as error:  # noqa: BLE001 (whatever it is, the user's test goes on)
            self._leave_out(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def compute(self) -> dict[str, float]:
        """The available values: there is no agreement without an output with classes."""
        for reason, times in self._left_out.items():
            warnings.warn(f"Not included in the agreement and SQNR of int8, {times} times: {reason}.", stacklevel=2)
        values = {}
        for name, metric in (("agreement", self.agreement), ("sqnr_db", self.sqnr)):
            seen = metric.update_called
            if self.of_all_processes and process_count() > 1:
                seen = any_process(seen)
            if seen:
                with warnings.catch_warnings():
                    # For a process without comparisons, while others had some.
                    warnings.filterwarnings("ignore", message=".*before the ``update`` method.*")
                    values[name] = float(metric.compute())
        return values

    def _leave_out(self, reason: str) -> None:
        self._left_out[reason] = self._left_out.get(reason, 0) + 1


def _on_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).float().cpu()
