"""The three variants of a network that an evaluation can run."""

from __future__ import annotations

from typing import Literal

from qat_lightning.errors import ConfigurationError

Variant = Literal["float", "fake_quant", "int8"]


VARIANTS: tuple[Variant, ...] = ("float", "fake_quant", "int8")


def check_variant(name: str | None) -> None:
    """Reject an unknown variant.

    Raises:
        ConfigurationError: The name is unknown; the message lists the valid ones.
    """
    if name is not None and name not in VARIANTS:
        raise ConfigurationError(f"variant {name!r} is unknown: use one of {', '.join(VARIANTS)}, or None.")
