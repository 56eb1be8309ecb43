"""Deciding before training in which mode a network is quantized and which layers stay float."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConfigurationError, MissingExtraError, NetworkError, QuantizationError, first_line
from qat_lightning.graph.example import Example
from qat_lightning.graph.training_flags import plain_train
from qat_lightning.modes.compile_switch import without_compiling
from qat_lightning.modes.registry import mode_for
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.rehearsal.rehearse import Inspect, OnFault, Rehearsal, nothing_moves, rehearse
from qat_lightning.settings.backends import MODES
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.modes import traits_of
from qat_lightning.settings.recipe import FAMILIES, Recipe

Rehearsed = tuple[QuantizedNetwork, nn.Module]
"""The int8 network of a rehearsal, and its reference."""

AUTO_ORDER = ("fx", "parts", "eager", "pt2e")
"""From best to worst, for equal shares of int8: fx trains fastest and quantizes functions, as do its parts; pt2e needs
a compiler.
"""

WITHIN = 0.01
"""Shares of int8 that differ by less count as equal."""


@dataclass(frozen=True)
class Decision:
    """The decision about a network before it is prepared.

    Attributes:
        mode: ``"eager"``, ``"fx"``, ``"pt2e"`` or ``"parts"``.
        why: Why this mode, in two lines at most; empty if the user chose it.
        left_float: What stays float because it cannot be int8, by its name in the network, and why.
        rehearsal: Result of the rehearsal; None if there was none.
        families: See `Recipe`; from the run that made the decision.
    """

    mode: str
    why: str = ""
    left_float: Mapping[str, str] = field(default_factory=dict)
    rehearsal: Rehearsal | None = None
    families: tuple[str, ...] = FAMILIES


def decide(
    mode: str,
    network: nn.Module,
    example: Example,
    recipe: Callable[[str], Recipe],
    *,
    prefix: str = "",
    on_fault: OnFault = "leave_float",
    admits: Callable[[str], None] = lambda mode: None,
    inspect: Inspect | None = None,
) -> Decision:
    """Rehearse a network; with ``mode="auto"`` in every mode that may be the best.

    The best mode has the largest share of multiply-accumulates in int8. Among modes within one point of it, those whose
    int8 network can be saved come first, and then the order of `AUTO_ORDER` applies. Mode parts is tried if the network
    cannot be captured as a whole. If none of the remaining modes can be better than the current one, they are not
    tried.

    Args:
        mode: The mode that the user asked for.
        network: Not changed; copies are tried.
        example: One call of it.
        recipe: Returns the recipe for a mode.
        prefix: The network's name in the LightningModule.
        on_fault: See `rehearse`.
        admits: Raises an error if something other than the network rules out a mode.
        inspect: See `rehearse`; called only for the chosen mode.

    Raises:
        QuantizationError: The mode, or every mode, fails; the message lists what was tried instead.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> decide("auto", network, Example((torch.randn(4, 3, 8, 8),)), lambda mode: Recipe(mode, "x86")).mode
        'fx'
    """

    def attempt(candidate: str, inspect: Inspect | None = None) -> Rehearsal:
        admits(candidate)
        return rehearse(network, example, recipe(candidate), prefix=prefix, on_fault=on_fault, inspect=inspect)

    if mode != "auto":
        try:
            found = attempt(mode, inspect)
        except (ConfigurationError, MissingExtraError):
            raise
        except QuantizationError as error:
            raise type(error)(f"{error} {_other_modes(mode, recipe, attempt)}".strip()) from error
        return Decision(mode, "", found.left_float, found)
    kept: dict[str, Rehearsed] = {}

    def keeping(candidate: str) -> Rehearsal:
        """Rehearse, and keep the networks for inspection, of the best mode so far only."""
        if inspect is None:
            return attempt(candidate)
        return attempt(candidate, lambda *networks: kept.update({candidate: networks}))

    tried, failed = _try_all(recipe, keeping, lambda best: _keep_only(kept, best))
    if not tried:
        raise NetworkError(
            f"No mode of {', '.join(MODES)} works for {type(network).__name__}: "
            + " | ".join(f"{candidate}: {reason}" for candidate, reason in failed.items())
        )
    chosen = _best(tried)
    if inspect is not None and chosen in kept:
        with nothing_moves(), without_compiling():
            inspect(*kept.pop(chosen))
    elif inspect is not None:  # its networks were dropped for a mode that was better for a while, or were not made
        attempt(chosen, inspect)
    found = tried[chosen]
    return Decision(chosen, _why(chosen, tried, failed), found.left_float, found)


def _keep_only(kept: dict[str, Rehearsed], mode: str) -> None:
    for other in [name for name in kept if name != mode]:
        del kept[other]


def _try_all(
    recipe: Callable[[str], Recipe], attempt: Callable[[str], Rehearsal], is_best: Callable[[str], None]
) -> tuple[dict[str, Rehearsal], dict[str, str]]:
    """The rehearsals of the modes, until no other can be better; and the reasons why others failed.

    Args:
        recipe: Returns the recipe for a mode.
        attempt: Rehearses it.
        is_best: Called with the best mode so far after each rehearsal.
    """
    tried: dict[str, Rehearsal] = {}
    failed: dict[str, str] = {}
    for candidate in AUTO_ORDER:
        if traits_of(candidate).instead_of in tried or not _there(recipe, candidate):
            continue  # It is not needed; or the backend does not support the mode, which is not the network's fault.
        try:
            found = tried[candidate] = attempt(candidate)
        except Exception as error:  # noqa: BLE001 - an error in upstream code means that the mode does not support the network
            ours = isinstance(error, QuantizationError)
            failed[candidate] = str(error) if ours else f"{type(error).__name__}: {error}"
            continue
        is_best(_best(tried))
        if found.int8_macs >= 1 - WITHIN and not found.unsaved:
            break
    return tried, failed


def _there(recipe: Callable[[str], Recipe], mode: str) -> bool:
    try:
        recipe(mode)
    except ConfigurationError:
        return False
    return True


def _best(tried: Mapping[str, Rehearsal]) -> str:
    largest = max(found.int8_macs for found in tried.values())
    close = [mode for mode, found in tried.items() if largest - found.int8_macs <= WITHIN]
    return min(close, key=lambda mode: (bool(tried[mode].unsaved), AUTO_ORDER.index(mode)))


def _why(chosen: str, tried: Mapping[str, Rehearsal], failed: Mapping[str, str]) -> str:
    """Two lines: the chosen mode, and the results of the others."""

    def share(mode: str) -> str:
        unsaved = ", and no file can hold it" if tried[mode].unsaved else ""
        return f"{tried[mode].int8_macs * 100:.1f} % of the multiply-accumulates in int8{unsaved}"

    others = [f"{mode}: {share(mode)}" for mode in tried if mode != chosen]
    others += [f"{mode}: {first_line(reason)}" for mode, reason in failed.items()]
    first = f"{chosen} is the best mode for this network ({share(chosen)})"
    if tried[chosen].parts:
        first += f": its parts {', '.join(map(repr, tried[chosen].parts))}, and the code around them stays Python"
    return f"{first}\n{'; '.join(others)}" if others else first


def _other_modes(mode: str, recipe: Callable[[str], Recipe], attempt: Callable[[str], Rehearsal]) -> str:
    """Which other mode works, as tried; pt2e last, because preparing takes long."""
    tried = []
    for candidate in ("fx", "eager", "pt2e"):
        if candidate == mode or not _there(recipe, candidate):
            continue
        try:
            found = attempt(candidate)
        except Exception:  # noqa: BLE001
            tried.append(f"mode={candidate!r} fails as well")
            continue
        if not found.int8_macs:
            tried.append(f"mode={candidate!r} works, with nothing in int8")
            continue
        share = f"{found.int8_macs * 100:.0f} % of the multiply-accumulates in int8"
        tried.append(f"mode={candidate!r} works ({share})")
        break
    return f"Tried on this network: {'; '.join(tried)}." if tried else ""


def choose_mode(
    mode: str, network: nn.Module, example: Example, recipe: Callable[[str], Recipe], *, prefix: str = ""
) -> Decision:
    """Choose a mode without a rehearsal: the first that prepares; for kinds without calibration the most int8 layers.

    Args:
        mode: The mode that the user asked for.
        network: Not changed; copies are tried.
        example: One call of it.
        recipe: Returns the recipe for a mode.
        prefix: The network's name in the LightningModule.

    Raises:
        NetworkError: No mode works; the message has the reason for each.
    """
    if mode != "auto":
        return Decision(mode)
    failed: dict[str, str] = {}
    layers: dict[str, int] = {}
    for candidate in AUTO_ORDER:
        # Only a rehearsal shows how much of it is int8 by parts.
        if traits_of(candidate).instead_of or not _there(recipe, candidate):
            continue
        trial = recipe(candidate)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if trial.kind in DIRECT and not trial.trained:
                    converted = quantize(network, example, trial, prefix=prefix)
                    layers[candidate] = sum(row.quantized for row in converted.coverage)
                    continue
                with plain_train(network):
                    mode_for(trial).prepare(copy.deepcopy(network), example, trial, prefix=prefix)
        except Exception as error:  # noqa: BLE001 - an error in upstream code means that the mode does not support the network
            failed[candidate] = first_line(str(error))
            continue
        others = "; ".join(f"{other}: {reason}" for other, reason in failed.items())
        order = ", ".join(mode for mode in AUTO_ORDER if not traits_of(mode).instead_of)
        first = f"{candidate} is the first of {order} that prepares this network"
        return Decision(candidate, f"{first}\n{others}" if others else first)
    if layers:
        best = max(layers, key=lambda candidate: layers[candidate])
        counts = [f"{candidate}: {count}" for candidate, count in layers.items()]
        return Decision(best, f"{best} makes the most layers integer ({'; '.join(counts)})")
    raise NetworkError(
        f"No mode of {', '.join(MODES)} works for {type(network).__name__}: "
        + " | ".join(f"{candidate}: {reason}" for candidate, reason in failed.items())
    )
