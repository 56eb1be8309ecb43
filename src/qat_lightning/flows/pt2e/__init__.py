"""Mode pt2e: capture with PT2 export, annotate with the backend's quantizer, train, convert, compile."""

from qat_lightning.flows.pt2e import _torchao  # noqa: F401 - before anything else of it imports torchao
from qat_lightning.flows.pt2e.flow import Pt2eFlow

__all__ = ["Pt2eFlow"]
