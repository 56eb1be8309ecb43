"""What has to be reached, and how near a network is to it: pure values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from qat_lightning.errors import ConfigurationError

Limit = Literal["size", "speedup", "drop"]
"""What can be limited, in the order in which a ladder settles it: what is cheap to try first."""

LIMITS: tuple[Limit, ...] = get_args(Limit)

LEAST_BITS = 2
"""Of a weight: see `qat_lightning.Scheme`."""


@dataclass(frozen=True)
class Target:
    """Limits: "at most 0.3 points, at least 3 times faster, under 2 MB, within an hour".

    Args:
        max_drop: How much of the float network's metric may be lost on the validation data, in the metric's own unit:
            0.003 for 0.3 points of an accuracy between 0 and 1.
        min_speedup: How many times faster than the float network in PyTorch, one sample on this machine's CPU.
        max_size_mb: Of what is shipped, in 10^6 bytes.
        max_minutes: How long to look. It limits the search, and is no goal by itself.
        confident: Whether the whole interval of the drop (95 % of a paired bootstrap) has to be within ``max_drop``,
            not only its mean. The search then goes on where the drop is undecided.

    Raises:
        ConfigurationError: Nothing is limited, or a limit is not possible.

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
        """Refuse what limits nothing, and what nothing can keep."""
        if self.max_drop is None and self.min_speedup is None and self.max_size_mb is None:
            raise ConfigurationError("A target needs a limit: give max_drop, min_speedup or max_size_mb.")
        for name in ("max_drop", "min_speedup", "max_size_mb", "max_minutes"):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "max_drop"):
                least = "a number of 0 or more" if name == "max_drop" else "a number above 0"
                raise ConfigurationError(f"target.{name}={value!r} is not possible: give {least}.")
        if not isinstance(self.confident, bool):
            raise ConfigurationError(f"target.confident={self.confident!r} is not possible: use True or False.")
        if self.confident and self.max_drop is None:
            raise ConfigurationError("target.confident=True is about the drop: give max_drop as well.")

    def check_size(self, parameters: int) -> None:
        """Refuse a size that no number of bits gives.

        Args:
            parameters: How many numbers the network to quantize has.

        Raises:
            ConfigurationError: With all of them at 2 bits it is larger.

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
        """By which share each limit is missed; those that are kept are left out.

        Args:
            drop: Loss of the metric, see `qat_lightning.ladder.judgement.Drop.judged`; None where it is not known.
            speedup: Times faster than float; likewise.
            size_mb: Likewise.

        Returns:
            The shares, infinite for what is not known.

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
