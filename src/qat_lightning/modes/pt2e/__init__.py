"""Mode pt2e: capture with PT2 export, annotate with the backend's quantizer, train, convert, compile."""

from qat_lightning.modes import _torchao  # noqa: F401 - before anything else of it imports torchao
from qat_lightning.modes.pt2e.mode import Pt2eMode

__all__ = ["Pt2eMode"]
