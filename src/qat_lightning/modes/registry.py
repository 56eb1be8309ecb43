"""Modes by their names; it stands above them."""

from __future__ import annotations

from qat_lightning.errors import ConfigurationError
from qat_lightning.modes.protocol import Flow


def get_flow(mode: str) -> Flow:
    """The flow of ``"eager"``, ``"fx"`` or ``"pt2e"``.

    Raises:
        ConfigurationError: There is no such mode. For ``"auto"`` see `qat_lightning.decision.choose_mode`.
    """
    # Imported here, so that one mode does not pay for the imports of another.
    if mode == "fx":
        from qat_lightning.flows.fx import FxFlow

        return FxFlow()
    if mode == "eager":
        from qat_lightning.flows.eager import EagerFlow

        return EagerFlow()
    if mode != "pt2e":
        raise ConfigurationError(f"mode={mode!r} has no flow: use 'eager', 'fx' or 'pt2e'.")
    from qat_lightning.flows.pt2e import Pt2eFlow

    return Pt2eFlow()
