"""How close the int8 outputs in a test are to those of fake-quant."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from qat_lightning.errors import in_full
from qat_lightning.measure.class_scores import Axis, ClassScores
from qat_lightning.measure.metrics import Agreement, SignalToQuantizationNoiseRatio, outputs_by_path
from qat_lightning.processes import any_process, process_count


class Fidelity:
    """How close the int8 outputs in a test are to those of fake-quant: agreement of the top-1 class, and SQNR.

    Agreement is of the output that is scores of classes, if there is one (see `ClassScores`). It never fails the test:
    outputs that cannot be compared, such as detections that exist in only one of the networks, are left out, and
    `compute` reports them.

    Args:
        of_all_processes: Whether `compute` sums over the processes of a distributed run; all of them have to call it
            then.
        classes: Numbers of classes that metrics of the LightningModule were given.
        scores: What knows which output is scores of classes; by default that is found in these outputs.

    Attributes:
        data: The batch that the next outputs are of, whose labels show which of them are scores of classes; None where
            only their shapes can.

    Example:
        >>> fidelity = Fidelity()
        >>> fidelity.update(torch.eye(3), torch.eye(3))
        >>> fidelity.compute()
        {'agreement': 1.0, 'sqnr_db': inf}
    """

    def __init__(
        self, *, of_all_processes: bool = True, classes: Collection[int] = (), scores: ClassScores | None = None
    ) -> None:
        self.of_all_processes = of_all_processes
        self.data: Any = None
        self.sqnr = SignalToQuantizationNoiseRatio(sync_on_compute=of_all_processes)
        self._classes = classes
        self._known = scores
        self._scores: dict[str, ClassScores] = {}
        self._choices: dict[str, dict[Axis, Agreement]] = {}
        self._constant = _Constant()
        self._left_out: dict[str, int] = {}

    def update(self, reference: Any, actual: Any, inputs: Any = (), of: str = "") -> None:
        """Add a pair of outputs.

        Args:
            reference: The expected ones: tensors, or containers of them.
            actual: The actual ones.
            inputs: What the network was called with, in any structure.
            of: The name of the network, where there are several.
        """
        wanted, got = outputs_by_path(reference), outputs_by_path(actual)
        compared: dict[str, Tensor] = {}
        for path in dict.fromkeys([*wanted, *got]):
            if path not in wanted or path not in got or wanted[path].shape != got[path].shape:
                self._leave_out("an output has a different shape from fake-quant's, or exists in only one of the two")
            elif wanted[path].numel() and (wanted[path].is_floating_point() or wanted[path].is_complex()):
                compared[path] = _on_cpu(wanted[path])
                self.sqnr.update(compared[path], _on_cpu(got[path]))
        self._constant.update(compared, inputs)
        real = {path: output for path, output in compared.items() if not wanted[path].is_complex()}
        choices = self._choices.setdefault(of, {})
        for path, axis in self._possible(of, real, inputs):
            agreement = choices.setdefault((path, axis), Agreement(sync_on_compute=False))
            agreement.update(real[path].movedim(axis, 1), _on_cpu(got[path]).movedim(axis, 1))

    def _possible(self, of: str, outputs: dict[str, Tensor], inputs: Any) -> list[Axis]:
        """What may be scores of classes."""
        if self._known is None:
            return self._scores.setdefault(of, ClassScores(self._classes)).update(outputs, inputs, self.data)
        self._scores[of] = self._known
        axis = self._known.axis
        return [axis] if axis is not None and axis[0] in outputs else []

    @property
    def agreement(self) -> Agreement:
        """Of the outputs that are scores of classes, in this process; without rows if there are none."""
        found = Agreement(sync_on_compute=self.of_all_processes)
        for name, scores in self._scores.items():
            one = None if scores.axis is None else self._choices[name].get(scores.axis)
            if one is not None:
                found.same, found.rows = found.same + one.same, found.rows + one.rows
                found._update_count += one._update_count
        return found

    def compare(self, reference: Callable[[], Any], actual: Any, inputs: Any = (), of: str = "") -> None:
        """Compute the reference and add the pair; if that fails, the pair is left out and reported at the end."""
        try:
            self.update(reference(), actual, inputs, of)
        except Exception as error:  # noqa: BLE001 (no failure may end the user's test)
            self._leave_out(in_full(error))

    def compute(self) -> dict[str, float]:
        """The available values: there is no agreement without an output that is scores of classes."""
        for reason, times in self._left_out.items():
            warnings.warn(f"Not included in the agreement and SQNR of int8, {times} times: {reason}.", stacklevel=2)
        several = self.of_all_processes and process_count() > 1
        if not any_process(not self._constant) if several else self._constant:
            warnings.warn(
                f"The outputs that int8 is compared with are the same in all {self._constant.calls} calls of the test, "
                "whatever the inputs are: no agreement and SQNR are reported, because they would say nothing. If the "
                "float network depends on its inputs in evaluation, train for more steps: until BatchNorm's running "
                "statistics match the data, activations can be so small that all of them round to zero.",
                stacklevel=2,
            )
            return {}
        values = {}
        for name, metric in (("agreement", self.agreement), ("sqnr_db", self.sqnr)):
            seen = metric.update_called
            if several:
                seen = any_process(seen)
            if seen:
                with warnings.catch_warnings():
                    # For a process without comparisons, while others had some.
                    warnings.filterwarnings("ignore", message=".*before the ``update`` method.*")
                    values[name] = float(metric.compute())
        return values

    def _leave_out(self, reason: str) -> None:
        self._left_out[reason] = self._left_out.get(reason, 0) + 1


class _Constant:
    """Whether outputs are the same in all calls, though inputs are not."""

    def __init__(self) -> None:
        self.calls = 0
        self._first: tuple[dict[str, Tensor], list[Tensor]] | None = None
        self._same, self._inputs_differ = True, False

    def update(self, outputs: dict[str, Tensor], inputs: Any) -> None:
        self.calls += 1
        if not self._same or not outputs:
            return
        given = [leaf for leaf in outputs_by_path(inputs).values() if leaf.numel()]
        if self._first is None:
            self._first = outputs, [leaf.clone() for leaf in given]
            return
        first, before = self._first
        self._same = outputs.keys() == first.keys() and all(
            torch.equal(*_of_one_length(output, first[path])) for path, output in outputs.items()
        )
        self._inputs_differ |= any(
            not torch.equal(*_of_one_length(one, other)) for one, other in zip(given, before, strict=False)
        )

    def __bool__(self) -> bool:
        return self._same and self._inputs_differ


def _of_one_length(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors without the rows that only one of them has: the last batch may be smaller."""
    if one.dim() == 0 or other.dim() == 0:
        return one, other
    rows = min(len(one), len(other))
    return one[:rows], other[:rows]


def _on_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).float().cpu()
