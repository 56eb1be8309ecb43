"""Choosing the mode that works for a network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

from torch import nn

from qat_lightning.backends import MODES
from qat_lightning.errors import ConfigurationError, NetworkError, QuantizationError
from qat_lightning.flows.base import Example, get_flow
from qat_lightning.flows.direct import quantize
from qat_lightning.kinds import DIRECT
from qat_lightning.recipe import Recipe

AUTO_ORDER = ("fx", "pt2e", "eager")
"""Best first: FX trains fastest of the graph modes and needs no compiler; eager leaves functional ops float."""


def choose_mode(
    mode: str, network: nn.Module, example: Example, recipe: Callable[[str], Recipe], *, prefix: str = ""
) -> tuple[str, str]:
    """The mode to use, and why, if it was for us to choose.

    It is the first that works; for the kinds without calibration the one that makes the most layers integer.

    Args:
        mode: What the user asked for.
        network: Tried on copies; left as it is.
        example: One call of it.
        recipe: Makes the recipe of a mode.
        prefix: The network's name in the LightningModule.

    Returns:
        A mode, and a sentence that is empty unless ``mode`` is ``"auto"``.

    Raises:
        NetworkError: No mode works; the message has each one's reason.
    """
    if mode != "auto":
        return mode, ""
    failed: list[str] = []
    layers: dict[str, int] = {}
    for candidate in AUTO_ORDER:
        try:
            trial = recipe(candidate)
        except ConfigurationError:
            continue  # The backend has no such mode, which is no failure of the network.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if trial.kind in DIRECT:
                    converted = quantize(network, example, trial, prefix=prefix)
                    layers[candidate] = sum(row.quantized for row in converted.coverage)
                    continue
                get_flow(candidate).prepare(copy.deepcopy(network), example, trial, prefix=prefix)
        except QuantizationError as error:
            failed.append(f"{candidate}: {error}")
            continue
        except Exception as error:  # noqa: BLE001 - a mode that breaks upstream is one that does not work here
            failed.append(f"{candidate}: {type(error).__name__}: {error}")
            continue
        why = f"{candidate} is the best that works for this network"
        return candidate, why + (
            f" ({'; '.join(failed)})" if failed else " (the first of " + ", ".join(AUTO_ORDER) + ")"
        )
    if layers:
        best = max(layers, key=lambda candidate: layers[candidate])
        counts = [f"{candidate}: {count}" for candidate, count in layers.items()]
        return best, f"{best} makes the most layers integer ({'; '.join([*counts, *failed])})"
    raise NetworkError(f"No mode of {', '.join(MODES)} works for {type(network).__name__}: " + " | ".join(failed))
