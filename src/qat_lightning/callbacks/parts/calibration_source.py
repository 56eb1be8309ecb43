"""The source of calibration data: the LightningModule's steps, or calls given by the user."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qat_lightning.callbacks.parts.calibration_data import (
    calibrate_in_steps,
    calibrated_calls,
    calibration_loader,
    try_steps,
)
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example, example_of
from qat_lightning.rehearsal.calibration import calibrate


class CalibrationSource:
    """Calls networks on calibration data.

    Args:
        batches: Maximum number of batches.
        loader: Batches for ``training_step``; None for the training loader.
        calls: Calls of the network instead, for several networks a mapping by name; None to use steps.

    Raises:
        ConfigurationError: Both were given, or ``calls`` is not a collection.
    """

    def __init__(self, batches: int, loader: Any, calls: Any) -> None:
        if loader is not None and calls is not None:
            raise ConfigurationError(
                "calibration_dataloader= and calls= cannot be combined: give batches for training_step, or calls of "
                "the network."
            )
        if calls is not None and (isinstance(calls, (Tensor, str)) or not hasattr(calls, "__iter__")):
            raise ConfigurationError(
                f"calls={type(calls).__name__} is not valid: give a list of calls of the network, a tensor, a tuple "
                "or a dict each; for several networks a dict of such lists by their names."
            )
        self.batches = batches
        self.loader = loader
        self._given = calls
        self._calls: dict[str, list[Example]] = {}

    @property
    def has_calls(self) -> bool:
        """Whether the user gave ``calls``."""
        return self._given is not None

    def examples(self, names: list[str]) -> Any:
        """Return the first call of each network, in the form of ``example_inputs``."""
        first = {name: self._of(name, len(names))[0] for name in names}
        return first if len(names) > 1 else first[names[0]]

    def try_it(self, trainer: Trainer, pl_module: LightningModule, slots: Mapping[str, Slot]) -> None:
        """Check before training that calibration will be possible after it.

        Raises:
            NetworkError: It will not; the message says what to do.
        """
        if not self.has_calls:
            try_steps(trainer, pl_module, slots, self.loader)

    def calibrate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        slots: Mapping[str, Slot],
        prepared: Mapping[str, nn.Module],
        *,
        keep_calls: bool,
    ) -> tuple[int, dict[str, list[Example]]]:
        """Calibrate networks, which are on the LightningModule's device.

        Returns:
            The number of batches, and the calls of each network; none with ``keep_calls=False`` where steps make them.
        """
        if self.has_calls:
            calls = self._on(pl_module.device, list(slots))
            return max(calibrate(network, calls[name]) for name, network in prepared.items()), calls
        loader = calibration_loader(trainer, pl_module, self.loader)
        if keep_calls:
            return calibrated_calls(pl_module, slots, prepared, loader, self.batches)
        return calibrate_in_steps(pl_module, slots, prepared, loader, self.batches), {}

    def _on(self, device: torch.device, names: list[str]) -> dict[str, list[Example]]:
        def moved(leaf: Any) -> Any:
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        return {
            name: [Example(*tree_map(moved, (call.args, call.kwargs))) for call in self._of(name, len(names))]
            for name in names
        }

    def _of(self, name: str, networks: int) -> list[Example]:
        """Return the calls of one network; cached, because the source may yield them only once."""
        if name in self._calls:
            return self._calls[name]
        given: Any = self._given
        if networks > 1:
            if not isinstance(given, Mapping) or name not in given:
                raise ConfigurationError(
                    f"calls= must have an entry for each network: give a dict with the key {name!r} as well."
                )
            given = given[name]
        taken = [example_of(call) for call in islice(given, self.batches)]
        if not taken:
            raise ConfigurationError(f"calls= has no call of {name!r}: give at least one.")
        self._calls[name] = taken
        return taken
