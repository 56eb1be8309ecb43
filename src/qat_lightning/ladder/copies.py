"""Copies of the float LightningModule and the data, so that each rung starts from the same state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything

from qat_lightning.errors import ConfigurationError
from qat_lightning.ladder.parts import set_up

Thing = TypeVar("Thing", LightningModule, LightningDataModule)


class Copies:
    """Copies a LightningModule and a LightningDataModule, which is set up once.

    Args:
        model: The float LightningModule; not changed.
        datamodule: The data; not changed.
        seed: The seed that each pair of copies starts with.
        trainer: Creates the Trainer that sets the data up.

    Attributes:
        model: A copy of the LightningModule without a Trainer.

    Raises:
        ConfigurationError: One of the two cannot be copied.
    """

    def __init__(
        self, model: LightningModule, datamodule: LightningDataModule, seed: int, trainer: Callable[[], Trainer]
    ) -> None:
        self.model = untied(model)
        self._datamodule = untied(datamodule)
        self._seed, self._trainer = seed, trainer
        self._has_data = False

    def fresh(self) -> tuple[LightningModule, LightningDataModule]:
        """Copies of both, after seeding everything.

        Raises:
            ConfigurationError: The Trainer has several processes.
        """
        if not self._has_data:
            self._datamodule, self._has_data = self._with_data(), True
        return self._pair()

    def _pair(self) -> tuple[LightningModule, LightningDataModule]:
        seed_everything(self._seed, workers=True, verbose=False)
        return copy.deepcopy(self.model), copy.deepcopy(self._datamodule)

    def _with_data(self) -> LightningDataModule:
        """The datamodule after ``setup``, so that the data it keeps is not read again for each rung.

        If ``setup`` creates objects that cannot be copied, the datamodule before ``setup``, and each rung calls it.
        """
        model, datamodule = self._pair()
        trainer = self._trainer()
        if trainer.world_size > 1:
            raise ConfigurationError(
                f"The Trainer has {trainer.world_size} processes, and a search runs in one: use devices=1."
            )
        set_up(trainer, model, datamodule)
        try:
            return untied(datamodule)
        except ConfigurationError:
            return self._datamodule


def untied(thing: Thing) -> Thing:
    """A copy of a LightningModule or a LightningDataModule, without a reference to a Trainer.

    Raises:
        ConfigurationError: It cannot be copied.
    """
    before = thing.__dict__.get("_trainer"), thing.__dict__.get("trainer")
    thing.trainer = None
    try:
        return copy.deepcopy(thing)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ConfigurationError(
            f"{type(thing).__name__} cannot be copied ({error}), and each step of the search starts from a "
            "copy of it: create what it holds in setup()."
        ) from error
    finally:
        thing.trainer = before[0] or before[1]
