"""Freezing BatchNorm: use statistics of recent batches, and warn where they still differ from those of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from qat_lightning.layers.batchnorm_window import (
    Difference,
    Snapshot,
    as_plain,
    differs,
    measuring,
    settle,
    snapshot,
    window_length,
)

_NAMED = 3
"""Number of layers named in a message."""


class BatchNormFreeze:
    """Keeps snapshots of BatchNorm's statistics, to compute the statistics of only the batches since then.

    Two snapshots are kept. One is taken whenever the number of trained batches is a multiple of the window's length,
    so the older one is at least one window old. Both are stored in the checkpoint: a resumed run freezes BatchNorm with
    the same statistics as an uninterrupted run.
    """

    def __init__(self) -> None:
        self._taken: list[tuple[int, dict[str, Snapshot]]] = []
        self._measuring = ExitStack()
        self._found: dict[str, Difference] = {}
        self._step = 0

    def forget(self) -> None:
        """Reset the state for a new training."""
        self._taken = []
        self.end()

    def look(self, networks: Mapping[str, nn.Module], batches: int) -> None:
        """Take a snapshot if one is due. Called before each batch while statistics are updated.

        Args:
            networks: The prepared networks by name.
            batches: Number of batches trained so far.
        """
        due = batches % max(map(window_length, networks.values()), default=1) == 0
        if not self._taken or (due and self._taken[-1][0] != batches):
            now = {name: snapshot(network) for name, network in networks.items()}
            self._taken = [*self._taken[-1:], (batches, now)]

    def freeze(self, networks: Mapping[str, nn.Module], batches: int, step: int, *, measure: bool) -> None:
        """Replace statistics that had not settled by those of recent batches; optionally compare on the next batch.

        Args:
            networks: The prepared networks by name.
            batches: Number of batches trained so far.
            step: The next optimizer step.
            measure: Whether to compare the frozen statistics with those of the next batch.
        """
        self._step = step
        if self._taken:
            since, then = self._taken[0]
            for name, network in networks.items():
                changed = settle(network, then.get(name, {}))
                if changed:
                    rank_zero_info(
                        f"{name!r}: BatchNorm freezes before step {step}, and the running statistics of {len(changed)} "
                        f"of its layers had not settled (in standard deviations: {_worst(changed)}). They were "
                        f"replaced by those of the last {batches - since} batches."
                    )
        self._taken = []
        self._found = {}
        if measure:
            for network in networks.values():
                self._measuring.enter_context(measuring(network, self._found))

    def say(self) -> None:
        """After the first batch with frozen statistics, warn of layers whose batch statistics still differ."""
        self._measuring.close()
        still = [difference for difference in self._found.values() if differs(difference)]
        if still:
            rank_zero_warn(
                f"BatchNorm was frozen before step {self._step}, and {len(still)} of {len(self._found)} layers compute "
                f"different statistics from those they are frozen with (in standard deviations: {_worst(still)}). "
                "Freeze it later (freeze_batchnorm=), or train longer."
            )
        self._found = {}

    def end(self) -> None:
        """Remove all hooks."""
        self._measuring.close()
        self._found = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots as plain values and tensors."""
        return {"taken": [[batches, as_plain(taken)] for batches, taken in self._taken]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; a checkpoint without snapshots clears the state."""
        self._taken = [
            (
                batches,
                {
                    network: {name: (values[0], values[1], values[2]) for name, values in statistics.items()}
                    for network, statistics in taken.items()
                },
            )
            for batches, taken in state.get("taken", [])
        ]


def _worst(differences: list[Difference]) -> str:
    ordered = sorted(differences, key=lambda difference: -difference.deviations)
    more = f" and {len(ordered) - _NAMED} more by less" if len(ordered) > _NAMED else ""
    return ", ".join(map(str, ordered[:_NAMED])) + more
