"""The metric that a model is judged by, stated once in a configuration as ``model.metric``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

MODES = ("max", "min")


@dataclass(frozen=True)
class ModelMetric:
    """The metric that a model is judged by, in validation and test.

    Checkpoints, early stopping, pruning and searches read it in the configuration; `qat_lightning.sensitivity`,
    `qat_lightning.compare` and ``method=auto`` read it here.

    Args:
        name: Its name without the stage: ``acc`` for ``val/acc`` and ``test/acc``.
        mode: ``max`` if larger is better, otherwise ``min``.
    """

    name: str
    mode: Literal["max", "min"] = "max"

    @classmethod
    def of(cls, config: Mapping[Any, Any]) -> ModelMetric | None:
        """The metric of a configuration.

        Args:
            config: The nested configuration of a run.

        Returns:
            The metric; None if the configuration is that of another program, or of an earlier release.

        Example:
            >>> ModelMetric.of({"model": {"name": "unet", "metric": {"name": "miou", "mode": "max"}}})
            ModelMetric(name='miou', mode='max')
        """
        model = config.get("model")
        stated = model.get("metric") if isinstance(model, Mapping) else None
        if not isinstance(stated, Mapping) or stated.get("mode") not in MODES or not stated.get("name"):
            return None
        return cls(str(stated["name"]), cast("Literal['max', 'min']", stated["mode"]))

    @property
    def larger_is_better(self) -> bool:
        """Whether larger values are better."""
        return self.mode == "max"

    def logged(self, stage: str) -> str:
        """The key under which a stage logs it.

        Example:
            >>> ModelMetric("miou").logged("val")
            'val/miou'
        """
        return f"{stage}/{self.name}"


def settled(difference: float, scale: float) -> float:
    """Round a difference of metrics to about a millionth of their scale: less is the rounding error of float32.

    Args:
        difference: The difference of two values of a metric, or a mean of such.
        scale: The largest of the values.

    Returns:
        The difference with the decimals that count, so that a limit met exactly is kept.

    Example:
        >>> import torch
        >>> first, second = torch.tensor([0.98, 0.977]).tolist()
        >>> first - second <= 0.003, settled(first - second, 0.98) <= 0.003
        (False, True)
    """
    resolved = 4e-7 * abs(scale)
    if not math.isfinite(difference) or not 0 < resolved < math.inf:
        return difference
    return round(difference, math.floor(-math.log10(resolved)))
