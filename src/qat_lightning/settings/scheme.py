"""How many bits weights and activations have, and on which grids: a pure value, checked when it is created."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

from qat_lightning.errors import ConfigurationError
from qat_lightning.settings.overrides import FLOAT, Overrides

Granularity = Literal["per_channel", "per_tensor", "per_group"]
ActivationGranularity = Literal["per_tensor", "per_token"]
WeightObserver = Literal["auto", "min_max", "mse"]
ActivationObserver = Literal["auto", "moving_average", "min_max", "histogram_mse", "histogram_kl", "percentile"]
LearnedStep = Literal["none", "lsq", "lsq+"]

CALIBRATION_ONLY = ("histogram_kl",)
"""Observers for calibration only: computing thousands of divergences per range is too slow for every training step."""


def stored_bits(weight_bits: int) -> int:
    """How many bits a weight takes in the file of an int8 network.

    Example:
        >>> stored_bits(3), stored_bits(5)
        (4, 8)
    """
    return 4 if weight_bits <= 4 else 8


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are quantized.

    Symmetric weights (zero point 0) are on ``[-(2**(bits-1) - 1), 2**(bits-1) - 1]``, as the int8 kernels of every
    backend require. Kernels read weights of fewer than 8 bits as int8 on a coarser grid; in the file, two weights of up
    to 4 bits share a byte. A scheme that no kernel of the backend supports (activations of fewer than 8 bits, or of 16
    where the backend lacks them, affine weights) is simulated: it trains and evaluates with fake-quantization, and
    there is no int8 network. `Recipe.simulated` says why.

    Args:
        weight_bits: 2 to 8.
        weight_symmetric: zero point 0; with False, the zero point follows from the range of the weights.
        weight_granularity: one scale for each output channel, for the tensor, or for each group of
            ``weight_group_size`` input channels (kinds ``"weight_only"`` and ``"dynamic"``).
        weight_group_size: 0, or the size of a group: a power of two from 16 to 1024.
        weight_observer: ``"min_max"``: the grid covers the largest weight; ``"mse"``: the range with the least mean
            squared error; ``"auto"``: ``"min_max"`` for 8 bits and ``"mse"`` for fewer.
        activation_bits: 2 to 8, or 16.
        activation_symmetric: put the zero point in the middle of the integer range instead of where the data needs it.
        activation_granularity: one range for all values of a call, or one for each token, that is, for the values along
            the last dimension (kind ``"dynamic"``).
        activation_observer: ``"moving_average"`` of the batches' ranges, ``"min_max"`` of all batches, or the range of
            a histogram with the least mean squared error (``"histogram_mse"``), without its tails (``"percentile"``),
            or in calibration with the least Kullback-Leibler divergence (``"histogram_kl"``). In calibration it is the
            histogram of all batches; in training each batch has its own, and the ranges are averaged as they move.
            ``"auto"``: ``"moving_average"`` in training and ``"histogram_mse"`` in calibration.
        activation_percentile: percentage of the values that ``"percentile"`` keeps on each side.
        averaging_constant: weight of the newest batch in a moving average of activation ranges, in (0, 1].
        learned_step: ``"lsq"``: scales are parameters that learn with the weights, once fake-quantization is enabled
            (Esser et al., 2020, https://arxiv.org/abs/1902.08153); ``"lsq+"``: the zero points of affine activations
            as well (Bhalgat et al., 2020, https://arxiv.org/abs/2004.09576).
        overrides: Layers with a scheme of their own: for each pattern of names, relative to the LightningModule as
            ``exclude`` is, a mapping of `qat_lightning.settings.overrides.OF_A_LAYER`, or the word ``"float"``. A
            pattern matches a layer by its name or by that of a module that contains it. Only the last pattern that
            matches applies; fields that it omits are those of this scheme. ``activation_bits`` are those of the layer's
            output. None, as in a configuration, means no overrides; the attribute is always a mapping.
        learned_rate: factor on the optimizer's learning rate for learned scales, above 0: with Adam and a learning rate
            of 0.001, 1.0 lets a scale change by 0.1 % per step.

    Raises:
        ConfigurationError: A value is outside what is listed here.

    Example:
        >>> Scheme(weight_bits=4).weight_quant_max
        7
        >>> Scheme(weight_bits=1)
        Traceback (most recent call last):
            ...
        qat_lightning.errors.ConfigurationError: scheme.weight_bits=1 is not valid: use an int from 2 to 8.
        >>> scheme = Scheme(weight_bits=4, overrides={"net.head": {"weight_bits": 8}, "net.stem": "float"})
        >>> scheme.of("net.head").weight_bits, scheme.of("net.blocks.0").weight_bits
        (8, 4)
    """

    weight_bits: int = 8
    weight_symmetric: bool = True
    weight_granularity: Granularity = "per_channel"
    weight_group_size: int = 0
    weight_observer: WeightObserver = "auto"
    activation_bits: int = 8
    activation_symmetric: bool = False
    activation_observer: ActivationObserver = "auto"
    activation_percentile: float = 99.99
    averaging_constant: float = 0.01
    learned_step: LearnedStep = "none"
    activation_granularity: ActivationGranularity = "per_tensor"
    overrides: dict[str, Any] | None = None
    learned_rate: float = 1.0

    def __post_init__(self) -> None:
        """Reject invalid values."""
        # Types first: arrays and tensors cannot be compared with a number.
        for bits in ("weight_bits", "activation_bits"):
            value = getattr(self, bits)
            if type(value) is not int or value not in (*range(2, 9), *((16,) if bits == "activation_bits" else ())):
                _refuse(bits, value, "an int from 2 to 8" + (", or 16" if bits == "activation_bits" else ""))
        for flag in ("weight_symmetric", "activation_symmetric"):
            if not isinstance(getattr(self, flag), bool):
                _refuse(flag, getattr(self, flag), "true or false")
        for name, kind in _WORDS.items():
            value, words = getattr(self, name), get_args(kind)
            if not isinstance(value, str) or value not in words:
                _refuse(name, value, " or ".join(map(repr, words)))
        for name, highest, possible in (
            ("averaging_constant", 1.0, "a number in (0, 1]"),
            ("activation_percentile", 100.0, "a number in (50, 100]"),
            ("learned_rate", 1000.0, "a number in (0, 1000]"),
        ):
            value = getattr(self, name)
            lowest = 50.0 if highest == 100.0 else 0.0
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest < value <= highest:
                _refuse(name, value, possible)
        self._check_group()
        object.__setattr__(self, "overrides", Overrides.checked(self.overrides))
        list(self.own())  # each is checked when it is created

    def of(self, name: str) -> Scheme:
        """The scheme of one layer: the fields of its override applied, and without overrides.

        Args:
            name: Name of the layer in the LightningModule; a layer that stays float gets the scheme without overrides.
        """
        fields = self._overrides.of(name)
        return replace(self, overrides=None, **({} if fields == FLOAT else fields))

    def own(self) -> Iterator[tuple[str, Scheme]]:
        """The patterns that change fields of the scheme, each with the resulting scheme.

        Raises:
            ConfigurationError: A field has an invalid value; the message names the pattern.
        """
        for pattern, fields in self._overrides.items():
            if fields == FLOAT:
                continue
            try:
                yield pattern, replace(self, overrides=None, **fields)
            except ConfigurationError as error:
                raise ConfigurationError(f"In scheme.overrides[{pattern!r}]: {error}") from error

    def leaves_float(self, name: str) -> bool:
        """Whether ``overrides`` leaves a layer float, by its name in the LightningModule."""
        return bool(self._overrides.of(name) == FLOAT)

    @property
    def _overrides(self) -> Overrides:
        return cast("Overrides", self.overrides)

    def _check_group(self) -> None:
        size = self.weight_group_size
        grouped = self.weight_granularity == "per_group"
        if type(size) is not int or (size != 0 and not (16 <= size <= 1024 and math.log2(size).is_integer())):
            _refuse("weight_group_size", size, "0, or a power of two from 16 to 1024")
        if grouped and not size:
            _refuse("weight_group_size", size, "a power of two from 16 to 1024 with weight_granularity='per_group'")
        if size and not grouped:
            _refuse("weight_group_size", size, "0, or weight_granularity='per_group'")

    @property
    def weight_quant_max(self) -> int:
        """The largest integer of a symmetric weight; the smallest is its negative."""
        return int(2 ** (self.weight_bits - 1) - 1)

    @property
    def per_channel(self) -> bool:
        """Whether each output channel of a weight has its own scale."""
        return self.weight_granularity == "per_channel"

    @property
    def learned(self) -> bool:
        """Whether scales are parameters."""
        return self.learned_step != "none"

    @property
    def chosen_weight_observer(self) -> Literal["min_max", "mse"]:
        """The weight observer, with ``"auto"`` resolved."""
        if self.weight_observer == "auto":
            return "min_max" if self.weight_bits == 8 else "mse"
        return self.weight_observer

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for a checkpoint; ``overrides`` is omitted if empty, as in earlier releases."""
        values = asdict(self)
        overrides = dict(values.pop("overrides"))
        return values | ({"overrides": overrides} if overrides else {})


_WORDS: dict[str, Any] = {
    "weight_granularity": Granularity,
    "weight_observer": WeightObserver,
    "activation_observer": ActivationObserver,
    "activation_granularity": ActivationGranularity,
    "learned_step": LearnedStep,
}


def _refuse(field: str, value: object, possible: str) -> None:
    raise ConfigurationError(f"scheme.{field}={value!r} is not valid: use {possible}.")
