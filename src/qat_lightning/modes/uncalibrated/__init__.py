"""Dynamic and weight-only quantization: the float network in, the integer network out, without calibration."""

from qat_lightning.modes.uncalibrated.flow import quantize

__all__ = ["quantize"]
