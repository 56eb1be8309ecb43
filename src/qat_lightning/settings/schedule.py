"""When fake-quantization is enabled and ranges and BatchNorm freeze: pure functions of step, epoch and plan.

Nothing here reads a Trainer or keeps state, so a resumed run gets the same answers as one that was never interrupted.

Example:
    >>> schedule = QuantizationSchedule(start=0.3, freeze_observers={"step": 70}, freeze_batchnorm=8)
    >>> plan = TrainingPlan(steps_per_epoch=10, max_epochs=10)
    >>> schedule.phase(step=29, epoch=2, plan=plan)
    Phase(fake_quant=False, observers=True, batchnorm_frozen=False, scales_learn=True)
    >>> schedule.phase(step=80, epoch=8, plan=plan)
    Phase(fake_quant=True, observers=False, batchnorm_frozen=True, scales_learn=True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

from qat_lightning.errors import ConfigurationError

Unit: TypeAlias = Literal["epoch", "step", "fraction"]

_HOW_TO_WRITE = (
    "Write {epoch: n}, {step: n} or {fraction: f}, a bare whole number for an epoch, "
    "a bare number from 0.0 to 1.0 for a fraction of the planned training, or null (None) for never."
)


@dataclass(frozen=True)
class SchedulePoint:
    """A moment of the training.

    - ``{step: n}`` is reached before the n-th optimizer step, counted from 0.
    - ``{epoch: n}`` is reached before the first batch of epoch n, counted from 0.
    - ``{fraction: f}`` is reached before the first optimizer step that has at least the share f of the planned
      optimizer steps behind it. The last step of a plan of 10 has 0.9 behind it, so ``{fraction: 1.0}`` is reached
      only when the training is over: no training step sees it.

    Under manual optimization ``{step: n}`` counts the actual steps of the optimizers of the quantized network, and
    ``{fraction: f}`` is a share of the planned batches, since the number of steps is not known beforehand.

    Args:
        unit: ``"epoch"``, ``"step"`` or ``"fraction"``.
        at: A whole number of 0 or more; for a fraction a number from 0 to 1.

    Raises:
        ConfigurationError: If the unit is unknown, or the number is not allowed for it.

    Example:
        >>> print(SchedulePoint("epoch", 3))
        {epoch: 3}
    """

    unit: Unit
    at: int | float

    def __post_init__(self) -> None:
        """Reject an invalid unit or number."""
        if self.unit == "fraction":
            object.__setattr__(self, "at", _share(self.at))
        elif self.unit in ("epoch", "step"):
            object.__setattr__(self, "at", _count(self.at, self.unit))
        else:
            raise ConfigurationError(f"{self.unit!r} is not a unit of a schedule point. {_HOW_TO_WRITE}")

    @classmethod
    def parse(cls, value: PointLike, *, name: str = "schedule point") -> SchedulePoint | None:
        """Read a schedule point as users write it, in Python or in YAML.

        Args:
            value: ``3`` (epoch 3), ``0.5`` (half of the planned training), a mapping with one of the keys ``epoch``,
                ``step`` and ``fraction`` (OmegaConf's too), a ``SchedulePoint``, or ``None`` for never.
            name: What the value is called in an error message.

        Returns:
            The point, or ``None`` for never.

        Raises:
            ConfigurationError: If the value has none of these forms. The message says what can be written.

        Example:
            >>> SchedulePoint.parse(3)
            SchedulePoint(unit='epoch', at=3)
            >>> SchedulePoint.parse({"step": 1200})
            SchedulePoint(unit='step', at=1200)
            >>> SchedulePoint.parse(0.5)
            SchedulePoint(unit='fraction', at=0.5)
        """
        if value is None or isinstance(value, SchedulePoint):
            return value
        try:
            if isinstance(value, Mapping):
                return cls._from_mapping(value)
            if isinstance(value, Integral) and not isinstance(value, bool):
                return cls("epoch", int(value))
            if isinstance(value, Real) and not isinstance(value, bool):
                return cls("fraction", value)
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}={_shown(value)}: {error}") from None
        raise ConfigurationError(
            f"{name}={_shown(value)}: a {type(value).__name__} is not a schedule point. {_HOW_TO_WRITE}"
        )

    @classmethod
    def _from_mapping(cls, value: Mapping[Any, Any]) -> SchedulePoint:
        if len(value) != 1:
            keys = ", ".join(map(str, value)) or "none"
            raise ConfigurationError(
                f"a schedule point has exactly one key, and this one has {len(value)} ({keys}). {_HOW_TO_WRITE}"
            )
        ((unit, at),) = value.items()
        if unit not in ("epoch", "step", "fraction"):
            raise ConfigurationError(f"unknown key {unit!r}. {_HOW_TO_WRITE}")
        return cls(unit, at)

    def __str__(self) -> str:
        return f"{{{self.unit}: {self.at}}}"


PointLike: TypeAlias = int | float | Mapping[str, Any] | SchedulePoint | None


@dataclass(frozen=True)
class TrainingPlan:
    """The planned length of the training.

    ``None``, ``-1`` and infinity all mean "no limit", or for ``steps_per_epoch`` "unknown".

    Args:
        steps_per_epoch: Optimizer steps of an epoch, not batches: gradient accumulation makes them fewer.
        max_steps: The limit on optimizer steps.
        max_epochs: The limit on epochs.

    Raises:
        ConfigurationError: If one of them is neither a whole number of 0 or more nor "no limit".

    Example:
        >>> TrainingPlan(steps_per_epoch=10, max_steps=-1, max_epochs=3).total_steps
        30
    """

    steps_per_epoch: int | None = None
    max_steps: int | None = None
    max_epochs: int | None = None

    def __post_init__(self) -> None:
        """Normalize the ways to say "no limit"."""
        for name in ("steps_per_epoch", "max_steps", "max_epochs"):
            object.__setattr__(self, name, _limit(getattr(self, name), name))

    @property
    def total_steps(self) -> int | None:
        """The planned optimizer steps: the smaller of both limits, or ``None`` if neither is known in steps.

        ``max_epochs`` counts only if ``steps_per_epoch`` is known.
        """
        limits = []
        if self.max_steps is not None:
            limits.append(self.max_steps)
        if self.max_epochs is not None and self.steps_per_epoch is not None:
            limits.append(self.max_epochs * self.steps_per_epoch)
        return min(limits, default=None)


def resolve(point: SchedulePoint | None, plan: TrainingPlan, *, name: str = "schedule point") -> int | None:
    """Compute before which optimizer step a point is reached.

    A fraction f of N planned steps is step ceil(f x N), with f as the decimal number that was written: 0.07 of 100
    steps is step 7, although the nearest binary number times 100 is slightly more.

    Args:
        point: The point, or ``None`` for never.
        plan: The planned training.
        name: What the point is called in an error message.

    Returns:
        The step, or ``None`` if it is never reached, or not known beforehand (an epoch of unknown length).

    Raises:
        ConfigurationError: If the point is a fraction and the plan has no end.

    Example:
        >>> resolve(SchedulePoint("fraction", 0.25), TrainingPlan(steps_per_epoch=10, max_epochs=3))
        8
    """
    if point is None:
        return None
    if point.unit == "step":
        return int(point.at)
    if point.unit == "epoch":
        return None if plan.steps_per_epoch is None else int(point.at) * plan.steps_per_epoch
    total = plan.total_steps
    if total is None:
        raise ConfigurationError(
            f"{name}={point} is a fraction of the planned training, whose length in steps is unknown ({plan}). Give "
            "the Trainer max_steps, or max_epochs with a loader that has a length, or write the point as {step: n} or "
            "{epoch: n}."
        )
    return math.ceil(exact(point.at) * total)


def exact(share: float) -> Fraction:
    """The decimal number that was written.

    Example:
        >>> exact(0.1)
        Fraction(1, 10)
    """
    return Fraction(repr(float(share)))


def reached(
    point: SchedulePoint | None,
    *,
    step: int,
    epoch: int,
    plan: TrainingPlan,
    done: Fraction | None = None,
    name: str = "schedule point",
) -> bool:
    """Whether a point is reached at the coming optimizer step.

    Args:
        point: The point, or ``None`` for never.
        step: Optimizer steps done so far, which is the number of the coming one.
        epoch: The running epoch, counted from 0.
        plan: The planned training.
        done: The share of the planned training that is done, where it does not follow from the steps.
        name: What the point is called in an error message.

    Returns:
        Whether it is reached. For a fixed plan this never changes from true to false as step and epoch grow.

    Raises:
        ConfigurationError: If the point is a fraction and the plan has no end.

    Example:
        >>> plan = TrainingPlan(steps_per_epoch=10, max_epochs=3)
        >>> [reached(SchedulePoint("epoch", 1), step=step, epoch=step // 10, plan=plan) for step in (9, 10, 11)]
        [False, True, True]
    """
    if point is None:
        return False
    if point.unit == "epoch":
        return epoch >= point.at
    if point.unit == "fraction" and done is not None:
        return done >= exact(point.at)
    at = resolve(point, plan, name=name)
    return at is not None and step >= at


@dataclass(frozen=True)
class Phase:
    """What is enabled for one optimizer step.

    Args:
        fake_quant: Whether weights and activations are rounded.
        observers: Whether the ranges of activations are still updated.
        batchnorm_frozen: Whether BatchNorm normalizes with its running statistics and no longer updates them.
        scales_learn: Whether learned scales begin to learn as soon as fake-quantization is enabled.
    """

    fake_quant: bool
    observers: bool
    batchnorm_frozen: bool
    scales_learn: bool = True

    def latched(self, earlier: Phase) -> Phase:
        """Keep what an earlier phase had reached, even if a longer plan would postpone it.

        Args:
            earlier: The previous phase, for example from a checkpoint.

        Returns:
            A phase that has reached everything that either of them has.

        Example:
            >>> now = Phase(fake_quant=False, observers=True, batchnorm_frozen=False)
            >>> now.latched(Phase(fake_quant=True, observers=False, batchnorm_frozen=False))
            Phase(fake_quant=True, observers=False, batchnorm_frozen=False, scales_learn=True)
        """
        return Phase(
            fake_quant=self.fake_quant or earlier.fake_quant,
            observers=self.observers and earlier.observers,
            batchnorm_frozen=self.batchnorm_frozen or earlier.batchnorm_frozen,
            scales_learn=self.scales_learn or earlier.scales_learn,
        )


@dataclass(frozen=True, init=False)
class QuantizationSchedule:
    """The points of quantization-aware training.

    Observers run from the first step, whatever ``start`` is, so ranges are there when fake-quantization is enabled.

    Args:
        start: When fake-quantization is enabled. ``None``: never.
        freeze_observers: When the ranges of activations freeze. ``None``: never.
        freeze_batchnorm: When BatchNorm's statistics freeze. ``None``: never; 0 keeps those of a pretrained network.
        learn_scales: When learned scales begin to learn, at ``start`` at the earliest. ``None``: at ``start``.

    Raises:
        ConfigurationError: If one of them is not a schedule point, or the ranges would freeze before any data was seen.

    Example:
        >>> QuantizationSchedule(start={"epoch": 2}, freeze_observers=0.7).freeze_observers
        SchedulePoint(unit='fraction', at=0.7)
    """

    start: SchedulePoint | None
    freeze_observers: SchedulePoint | None
    freeze_batchnorm: SchedulePoint | None
    learn_scales: SchedulePoint | None

    def __init__(
        self,
        start: PointLike = 0,
        freeze_observers: PointLike = None,
        freeze_batchnorm: PointLike = None,
        learn_scales: PointLike = None,
    ) -> None:
        points = {"start": start, "freeze_observers": freeze_observers, "freeze_batchnorm": freeze_batchnorm}
        points["learn_scales"] = learn_scales
        for name, value in points.items():
            object.__setattr__(self, name, SchedulePoint.parse(value, name=name))
        if self.freeze_observers is not None and self.freeze_observers.at == 0:
            raise ConfigurationError(
                f"freeze_observers={self.freeze_observers} freezes the ranges of activations before any batch was "
                "seen, so there would be none to quantize with. Write a later point, for example {epoch: 1} or "
                "{fraction: 0.7}, or null (None) for never."
            )

    def phase(self, step: int, epoch: int, plan: TrainingPlan, done: Fraction | None = None) -> Phase:
        """What is enabled for the coming optimizer step.

        Args:
            step: Optimizer steps done so far, which is the number of the coming one.
            epoch: The running epoch, counted from 0.
            plan: The planned training.
            done: The share of the planned training that is done, where it does not follow from the steps.

        Returns:
            The phase; it depends on the arguments only.

        Raises:
            ConfigurationError: If a point is a fraction and the plan has no end.

        Example:
            >>> plan = TrainingPlan(steps_per_epoch=10, max_epochs=2)
            >>> QuantizationSchedule(start=1).phase(step=10, epoch=1, plan=plan)
            Phase(fake_quant=True, observers=True, batchnorm_frozen=False, scales_learn=True)
        """

        def on(name: str) -> bool:
            return reached(getattr(self, name), step=step, epoch=epoch, plan=plan, done=done, name=name)

        return Phase(
            fake_quant=on("start"),
            observers=not on("freeze_observers"),
            batchnorm_frozen=on("freeze_batchnorm"),
            scales_learn=self.learn_scales is None or on("learn_scales"),
        )


def _count(value: Any, unit: str) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0:
        return int(value)
    raise ConfigurationError(f"{{{unit}: n}} needs a whole number of 0 or more, not {value!r}. {_HOW_TO_WRITE}")


def _share(value: Any) -> float:
    number = value  # keeps its type: not every Real can be converted to float
    if isinstance(value, Real) and not isinstance(value, bool) and 0 <= number <= 1:
        return float(value)
    raise ConfigurationError(f"a fraction is a number from 0.0 to 1.0, not {value!r}. {_HOW_TO_WRITE}")


def _limit(value: Any, name: str) -> int | None:
    if value is None or value == -1 or value == math.inf:
        return None
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0:
        return int(value)
    raise ConfigurationError(
        f"{name}={value!r} is not a length of a training: give a whole number of 0 or more, or None or -1 for no limit."
    )


def _shown(value: Any) -> str:
    return repr(dict(value)) if isinstance(value, Mapping) else repr(value)
