"""Converting as much as possible: a faulty layer or op stays float, without failing the fit or other layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from qat_lightning.errors import (
    ConfigurationError,
    ConversionError,
    MissingExtraError,
    NetworkError,
    QuantizationError,
    VerificationError,
    first_line,
)
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.layers.operators import WEIGHTED
from qat_lightning.modes.left_float import layer_of, leave_float, leaving_float
from qat_lightning.modes.prepared import cpu_copy, prepared_state
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import mode_for
from qat_lightning.modes.replaced import take_replaced
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.recipe import Recipe

_NEAR_DB = 45.0
"""SQNR below which the reason of a faulty layer includes the figure."""

_ROUNDS = 12
"""Number of faults that are searched one by one; after that, everything up to the last one is left float."""


@dataclass(frozen=True)
class Conversion:
    """An int8 network, and the layers and ops that stayed float for it.

    Attributes:
        converted: The result of the mode's conversion.
        left_float: Layers and ops that turned out to have no int8 form this time, by their names in the network, and
            why.
    """

    converted: Converted
    left_float: dict[str, str]


def convert_what_can_be(prepared: nn.Module, example: Example) -> Conversion:
    """Convert a prepared network; what cannot be int8 is left float, in the prepared network too.

    First, what the error names is left float. If it names nothing, the faulty part is found by bisection: in execution
    order, the first part that has to be float, along with all before it, for the conversion to succeed.

    Args:
        prepared: The result of a mode's ``prepare``, with ranges; changed only if something is left float.
        example: One call of it.

    Raises:
        QuantizationError: It fails with everything float as well; the prepared network is then unchanged.
        NetworkError: Nothing would be left to quantize.

    Example:
        >>> import torch
        >>> from qat_lightning import calibrate
        >>> from qat_lightning.modes.registry import get_mode
        >>> call = Example((torch.randn(4, 8),))
        >>> prepared = get_mode("fx").prepare(nn.Sequential(nn.Linear(8, 2)), call, Recipe("fx", "x86"))
        >>> _ = calibrate(prepared, [call])
        >>> convert_what_can_be(prepared, call).left_float
        {}
    """
    state = prepared_state(prepared)
    mode = mode_for(state.recipe)

    def attempt(left: Mapping[str, str]) -> Converted:
        trial = cpu_copy(prepared)
        leave_float(trial, left, example)
        return mode.convert(trial, example)

    def parts() -> list[str]:
        return mode.parts(prepared)

    replaced = take_replaced(prepared)
    try:
        conversion = _search(attempt, parts, state.float_network, state.recipe, replaced)
    except QuantizationError as error:
        if not replaced:
            raise
        what = "; ".join(f"{join(state.prefix, name)!r}: {why}" for name, why in replaced.items())
        raise ConversionError(f"{what}. With it there is no int8 network: {error}") from error
    leave_float(prepared, conversion.left_float, example)
    return conversion


def quantize_what_can_be(network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "") -> Conversion:
    """`convert_what_can_be` for the kinds without calibration.

    Args:
        network: The float network; not changed.
        example: One call of it.
        recipe: Kind ``"dynamic"`` or ``"weight_only"``; layers that it leaves float stay float.
        prefix: The network's dotted name in the LightningModule.

    Raises:
        QuantizationError: It fails with everything float as well.
        NetworkError: Nothing would be left to quantize.
    """

    def attempt(left: Mapping[str, str]) -> Converted:
        return quantize(network, example, leaving_float(recipe, left, prefix), prefix=prefix)

    def parts() -> list[str]:
        layers = [name for name, module in network.named_modules() if isinstance(module, WEIGHTED)]
        return [name for name in layers if recipe.selects(join(prefix, name))]

    return _search(attempt, parts, network, recipe)


def reason_of(error: Exception, name: str = "") -> str:
    """Why something is left float, as a phrase for the coverage and for a warning."""
    if isinstance(error, VerificationError):
        wrong = [row for row in error.checks if layer_of(row.name) == name and (row.fault or row.sqnr_db < _NEAR_DB)]
        if not wrong:
            return "its int8 output differs from fake-quant"
        figure = f"{wrong[0].sqnr_db:.1f} dB of SQNR on the same input"
        return f"in int8 it differs from fake-quant ({wrong[0].fault or figure})"
    return f"it cannot be converted: {first_line(error)}"


def _search(
    attempt: Callable[[Mapping[str, str]], Converted],
    parts: Callable[[], list[str]],
    network: nn.Module,
    recipe: Recipe,
    replaced: Mapping[str, str] = MappingProxyType({}),
) -> Conversion:
    """Leave faulty parts float, until a conversion succeeds."""
    left = dict(replaced)
    first: Exception | None = None
    for turn in range(_ROUNDS):
        try:
            return Conversion(attempt(left), left)
        except (ConfigurationError, MissingExtraError):
            raise  # not the fault of a layer
        except Exception as error:  # noqa: BLE001 - upstream's converters and kernels may fail in any way
            first = first or error
            possible = [name for name in parts() if name not in left]
            found = _named(error, possible) or _bisected(attempt, left, possible, error, to_the_end=turn == _ROUNDS - 2)
        if not found:
            break
        left |= found
        if not any(_is_layer(network, name) for name in possible if name not in left):
            raise _nothing_left(network, recipe, left) from first
    assert first is not None
    raise first


def _named(error: Exception, possible: list[str]) -> dict[str, str]:
    """The parts that an error names as faulty, if they can be left float."""
    names = dict.fromkeys(name if name in possible else layer_of(name) for name in getattr(error, "layers", ()))
    return {name: reason_of(error, name) for name in names if name in possible}


def _bisected(
    attempt: Callable[[Mapping[str, str]], Converted],
    left: Mapping[str, str],
    possible: list[str],
    error: Exception,
    *,
    to_the_end: bool,
) -> dict[str, str]:
    """The first part that has to be float, with all before it; empty if that does not help."""

    def converts(count: int) -> bool:
        try:
            attempt({**left, **dict.fromkeys(possible[:count], "")})
        except Exception:  # noqa: BLE001
            return False
        return True

    if not possible or not converts(len(possible)):
        return {}
    last = first_that(converts, len(possible))
    chosen = possible[:last] if to_the_end else possible[last - 1 : last]
    return dict.fromkeys(chosen, reason_of(error))


def first_that(holds: Callable[[int], bool], end: int) -> int:
    """The smallest number from 1 to ``end`` for which ``holds`` is true, if it is true for all larger ones.

    Example:
        >>> first_that(lambda n: n >= 5, 12)
        5
    """
    low, high = 1, end
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _nothing_left(network: nn.Module, recipe: Recipe, left: Mapping[str, str]) -> NetworkError:
    why = "; ".join(f"{name or 'itself'}: {reason}" for name, reason in list(left.items())[:8])
    return NetworkError(
        f"No layer of {type(network).__name__} can be int8 with mode={recipe.mode!r}, backend={recipe.backend!r} and "
        f"kind={recipe.kind!r} ({why})."
    )


def _is_layer(network: nn.Module, name: str) -> bool:
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True
