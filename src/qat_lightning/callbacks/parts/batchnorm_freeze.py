"""What happens to BatchNorm when it freezes: statistics of the recent batches, and a word where they still differ."""

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
"""As many layers are named in a message."""


class BatchNormFreeze:
    """Keeps the statistics of some batches ago, from which those of the batches since follow.

    Two snapshots are kept, taken when the number of trained batches is a multiple of the window's length: the older
    one is at least one window old, and both are in the checkpoint, so that a resumed run freezes as one that was never
    broken off.
    """

    def __init__(self) -> None:
        self._taken: list[tuple[int, dict[str, Snapshot]]] = []
        self._measuring = ExitStack()
        self._found: dict[str, Difference] = {}
        self._step = 0

    def forget(self) -> None:
        """Begin a new training."""
        self._taken = []
        self.end()

    def look(self, networks: Mapping[str, nn.Module], batches: int) -> None:
        """Before each batch while statistics move: take a snapshot where one is due.

        Args:
            networks: The prepared ones by name.
            batches: As many were trained.
        """
        due = batches % max(map(window_length, networks.values()), default=1) == 0
        if not self._taken or (due and self._taken[-1][0] != batches):
            now = {name: snapshot(network) for name, network in networks.items()}
            self._taken = [*self._taken[-1:], (batches, now)]

    def freeze(self, networks: Mapping[str, nn.Module], batches: int, step: int, *, measure: bool) -> None:
        """At the freeze: see that the statistics are those of the recent batches, and measure them in the next one.

        Args:
            networks: The prepared ones by name.
            batches: As many were trained.
            step: The coming optimizer step.
            measure: Whether to compare them with what the next batch shows.
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
        """After the first batch with frozen statistics: name the layers in which they still differ from it."""
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
        """Leave no hook behind."""
        self._measuring.close()
        self._found = {}

    def state_dict(self) -> dict[str, Any]:
        """The snapshots, in plain values and tensors."""
        return {"taken": [[batches, as_plain(taken)] for batches, taken in self._taken]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`; a checkpoint without such entries clears the state."""
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
