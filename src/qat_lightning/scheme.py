"""What is rounded to how many bits: a pure value, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qat_lightning.errors import ConfigurationError

Granularity = Literal["per_channel", "per_tensor"]


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are put on an integer grid.

    Weights are symmetric (zero point 0) on ``[-(2**(bits-1) - 1), 2**(bits-1) - 1]``, which is what the int8 kernels of
    every backend take. Activations are 8 bit: fewer bits cannot be held by an int8 kernel, which clamps at its storage
    type. Weights of fewer than 8 bits are stored as int8, on a coarser grid.

    Args:
        weight_bits: 2 to 8.
        weight_granularity: one scale for each output channel, or one for the tensor.
        activation_bits: 8.
        activation_symmetric: put the zero point in the middle of the range instead of where the data needs it.
        averaging_constant: weight of the newest batch in the moving average of activation ranges, in (0, 1].

    Raises:
        ConfigurationError: A value is outside what is listed here.

    Example:
        >>> Scheme(weight_bits=4).weight_quant_max
        7
        >>> Scheme(weight_bits=1)
        Traceback (most recent call last):
            ...
        qat_lightning.errors.ConfigurationError: scheme.weight_bits=1 is not possible: use an int from 2 to 8.
    """

    weight_bits: int = 8
    weight_granularity: Granularity = "per_channel"
    activation_bits: int = 8
    activation_symmetric: bool = False
    averaging_constant: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what no kernel can hold."""
        # By type first: arrays and tensors have no answer to a comparison.
        if type(self.weight_bits) is not int or self.weight_bits not in range(2, 9):
            _refuse("weight_bits", self.weight_bits, "an int from 2 to 8")
        granularity: Any = self.weight_granularity
        if not isinstance(granularity, str) or granularity not in ("per_channel", "per_tensor"):
            _refuse("weight_granularity", self.weight_granularity, "'per_channel' or 'per_tensor'")
        if type(self.activation_bits) is not int or self.activation_bits != 8:
            _refuse("activation_bits", self.activation_bits, "8, since int8 kernels clamp activations at 8 bits")
        if not isinstance(self.activation_symmetric, bool):
            _refuse("activation_symmetric", self.activation_symmetric, "true or false")
        constant = self.averaging_constant
        if isinstance(constant, bool) or not isinstance(constant, (int, float)) or not 0 < constant <= 1:
            _refuse("averaging_constant", constant, "a number in (0, 1]")

    @property
    def weight_quant_max(self) -> int:
        """The largest integer of a weight; the smallest is its negative."""
        return int(2 ** (self.weight_bits - 1) - 1)

    @property
    def per_channel(self) -> bool:
        """Whether each output channel of a weight has its own scale."""
        return self.weight_granularity == "per_channel"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, as a checkpoint holds them."""
        return asdict(self)


def _refuse(field: str, value: object, possible: str) -> None:
    raise ConfigurationError(f"scheme.{field}={value!r} is not possible: use {possible}.")
