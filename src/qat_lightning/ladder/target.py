"""The target of a search, and how far a network is from it: pure values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from qat_lightning.errors import ConfigurationError

Limit = Literal["size", "speedup", "drop"]
"""The limits, in the order in which a search settles them: cheap ones first."""

LIMITS: tuple[Limit, ...] = get_args(Limit)

LEAST_BITS = 2
"""The minimum for a weight: see `qat_lightning.Scheme`."""


@dataclass(frozen=True)
class Target:
    """Limits: "at most 0.3 points, at least 3 times faster, under 2 MB, within an hour".

    Args:
        max_drop: Largest loss of the float network's metric on the validation data, in the metric's own unit: 0.003 for
            0.3 points of an accuracy between 0 and 1.
        min_speedup: Speed relative to the float network in PyTorch, one sample on this machine's CPU.
        max_size_mb: Size of the shipped files, in 10^6 bytes.
        max_minutes: Duration of the search; a limit, not a goal.
        confident: Whether the whole interval of the drop (95 % of a paired bootstrap) must be within ``max_drop``, not
            only its mean. The search then continues while the drop is undecided.

    Raises:
        ConfigurationError: There is no limit, or a value is invalid.

    Example:
        >>> Target(max_drop=0.003, min_speedup=2).words()
        'a drop of at most 0.003, at least 2 times faster'
        >>> Target(max_minutes=5)
        Traceback (most recent call last):
            ...
        qat_lightning.errors.ConfigurationError: A target needs a limit: give max_drop, min_speedup or max_size_mb.
    """

    max_drop: float | None = None
    min_speedup: float | None = None
    max_size_mb: float | None = None
    max_minutes: float | None = None
    confident: bool = False

    def __post_init__(self) -> None:
        """Check that there is a limit, and that each is valid."""
        if self.max_drop is None and self.min_speedup is None and self.max_size_mb is None:
            raise ConfigurationError("A target needs a limit: give max_drop, min_speedup or max_size_mb.")
        for name in ("max_drop", "min_speedup", "max_size_mb", "max_minutes"):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "max_drop"):
                least = "a number of 0 or more" if name == "max_drop" else "a number above 0"
                raise ConfigurationError(f"target.{name}={value!r} is not valid: give {least}.")
        if not isinstance(self.confident, bool):
            raise ConfigurationError(f"target.confident={self.confident!r} is not valid: use True or False.")
        if self.confident and self.max_drop is None:
            raise ConfigurationError("target.confident=True is about the drop: give max_drop as well.")

    def check_size(self, parameters: int) -> None:
        """Refuse a size that no number of bits can reach.

        Args:
            parameters: Number of parameters of the network to quantize.

        Raises:
            ConfigurationError: The network is larger even with 2 bits per parameter.

        Example:
            >>> Target(max_size_mb=2).check_size(4_000_000)
        """
        least = parameters * LEAST_BITS / 8 / 1e6
        if self.max_size_mb is not None and self.max_size_mb < least:
            raise ConfigurationError(
                f"target.max_size_mb={self.max_size_mb:g} cannot be reached: {parameters:,} parameters take "
                f"{least:.3g} MB with {LEAST_BITS} bits each, the minimum. Give a larger limit, or a smaller network."
            )

    def missed(self, drop: float | None, speedup: float | None, size_mb: float | None) -> dict[Limit, float]:
        """The relative excess over each limit that is missed.

        Args:
            drop: Loss of the metric, see `qat_lightning.ladder.judgement.Drop.judged`; None if not known.
            speedup: Speed relative to float; None if not known.
            size_mb: Size of the shipped files; None if not known.

        Returns:
            The relative excess by limit, infinite for unknown values; limits that are kept are left out.

        Example:
            >>> Target(max_drop=0.01, min_speedup=2).missed(0.02, 4.0, None)
            {'drop': 1.0}
        """
        found: dict[Limit, float] = {}
        for limit, value, most in (
            ("size", size_mb, self.max_size_mb),
            ("speedup", None if speedup is None else -speedup, None if self.min_speedup is None else -self.min_speedup),
            ("drop", drop, self.max_drop),
        ):
            if most is not None and (value is None or not value <= most):
                far = math.inf if value is None or math.isnan(value) else (value - most) / (abs(most) or 1.0)
                found[limit] = far  # type: ignore[index]
        return found

    def words(self) -> str:
        """The limits in words."""
        said = []
        if self.max_drop is not None:
            said.append(f"a drop of at most {self.max_drop:g}{' with its whole interval' if self.confident else ''}")
        if self.min_speedup is not None:
            said.append(f"at least {self.min_speedup:g} times faster")
        if self.max_size_mb is not None:
            said.append(f"at most {self.max_size_mb:g} MB")
        if self.max_minutes is not None:
            said.append(f"found within {self.max_minutes:g} minutes")
        return ", ".join(said)
