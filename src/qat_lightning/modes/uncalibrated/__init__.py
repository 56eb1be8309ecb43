"""Dynamic and weight-only quantization: converting a float network without calibration."""

from qat_lightning.modes.uncalibrated.flow import quantize

__all__ = ["quantize"]
