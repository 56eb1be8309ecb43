"""Modes by name."""

from __future__ import annotations

from qat_lightning.errors import ConfigurationError
from qat_lightning.modes.protocol import Mode
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.recipe import Recipe


def mode_for(recipe: Recipe) -> Mode:
    """The mode that prepares and converts networks for a recipe, depending on its kind."""
    if recipe.kind in DIRECT:
        from qat_lightning.modes.uncalibrated.training import DirectMode

        return DirectMode()
    return get_mode(recipe.mode)


def get_mode(mode: str) -> Mode:
    """The mode called ``"eager"``, ``"fx"``, ``"pt2e"`` or ``"parts"``.

    Raises:
        ConfigurationError: There is no such mode. For ``"auto"`` see `qat_lightning.rehearsal.auto.choose_mode`.
    """
    # Imported here, so that each mode is imported only if used.
    if mode == "fx":
        from qat_lightning.modes.fx.mode import FxMode

        return FxMode()
    if mode == "eager":
        from qat_lightning.modes.eager.mode import EagerMode

        return EagerMode()
    if mode == "parts":
        from qat_lightning.modes.parts.mode import PartsMode

        return PartsMode()
    if mode != "pt2e":
        raise ConfigurationError(f"mode={mode!r} is unknown: use 'eager', 'fx', 'pt2e' or 'parts'.")
    from qat_lightning.modes.pt2e import Pt2eMode

    return Pt2eMode()
